//! The command line of sdxl-squeeze.
//!
//! Exit codes: 0 done, 1 failed, 2 bad input.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
