//! The whole way from a prompt to a picture, as `diffusers.StableDiffusionXLPipeline` goes it.

mod folder;
mod generate;
mod prompt;
mod sampling;

pub use folder::{PipelineFolder, TextPart};
pub use generate::{GenerateRequest, Generated, decode_with, generate, load_vae};
pub use prompt::{Guidance, PromptEmbedding, PromptEncoder, time_ids};
pub use sampling::{Predictor, sample};
