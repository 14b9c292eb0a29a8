//! The program `sdxl-squeeze`.
//!
//! The program ends with exit code 0 when the command is done, 1 when it failed, and 2 when its
//! input is at fault.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
