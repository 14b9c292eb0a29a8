//! Text encoders and their tokenizers.

mod added_tokens;
mod clip;
mod config;
mod side;
mod tokenizer;
pub mod vocabulary;

pub use clip::{CLIP_LENGTH, ClipText, TextStates};
pub use config::{Activation, EndOfText, TextConfig};
pub use tokenizer::{BytePairs, ClipTokenizer, Tokens};
