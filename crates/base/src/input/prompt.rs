//! The length of a prompt.

use crate::error::{Error, Result};
use crate::number;
use crate::shorten::shorten;

/// The most bytes of a prompt. Encoders read 77 tokens of it, some 400 bytes.
pub const PROMPT_BYTES: usize = 64 << 10;

/// Refuses a prompt that is too long to be one. `which` names the prompt in the message.
///
/// # Errors
/// [`Error::Argument`] if it has more than 64 KiB.
pub fn check_prompt(which: &str, prompt: &str) -> Result<()> {
    prompt_of_length(which, prompt).map_err(Error::Argument)
}

/// As [`check_prompt`], with the message alone.
pub fn prompt_of_length(which: &str, prompt: &str) -> Result<(), String> {
    if prompt.len() <= PROMPT_BYTES {
        return Ok(());
    }
    let (bytes, most) = (number::count(prompt.len() as u64), PROMPT_BYTES >> 10);
    Err(format!("{which} has {bytes} bytes; at most {most} KiB (it begins `{}`)", shorten(prompt)))
}
