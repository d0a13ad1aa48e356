"""Other systems than Linux on x86: what they lack is taken away, and everything runs."""
