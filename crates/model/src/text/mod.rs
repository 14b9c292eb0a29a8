//! Text encoders and their tokenizers.

mod clip;
mod config;
mod tokenizer;
pub mod vocabulary;

pub use clip::{CLIP_LENGTH, ClipText, TextStates};
pub use config::{Activation, EndOfText, TextConfig};
pub use tokenizer::{BytePairs, ClipTokenizer, Tokens};
