//! From a prompt to a picture, as `diffusers.StableDiffusionXLPipeline` computes it.

mod few_step;
mod folder;
mod generate;
mod lora;
mod parts;
pub mod picture;
mod prompt;
mod sampling;
mod single;
mod unet_weights;

pub use few_step::SamplingDefaults;
pub use folder::{PipelineFolder, TextPart};
pub use generate::{GenerateRequest, Generated, decode_with, generate, load_vae};
pub use lora::LoraFile;
pub use parts::ModelFiles;
pub use prompt::{Guidance, PromptEmbedding, PromptEncoder, time_ids};
pub use sampling::{Predictor, sample};
pub use unet_weights::{StoredTensor, UnetSource, UnetWeights, verify};
