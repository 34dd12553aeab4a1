//! The `retune` command: parse, run, print the error chain, exit code.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: retune::BoundedAllocator = retune::BoundedAllocator;

fn main() -> ExitCode {
    retune::cli::main()
}
