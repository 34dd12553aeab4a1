//! The `retune` command: parse, run, print the error chain, exit code.

fn main() {}
