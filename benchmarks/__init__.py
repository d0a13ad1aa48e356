"""Speed and memory, each against a yardstick that runs in the same minutes: `make bench`, docs/performance.md."""
