//! From a prompt to a picture, as `diffusers.StableDiffusionXLPipeline` computes it.

mod few_step;
mod folder;
mod generate;
mod image_channels;
mod image_input;
mod lora;
mod lora_file;
mod parts;
pub mod picture;
mod picture_file;
mod pieces;
mod prompt;
mod prompt_batch;
mod prompt_options;
mod sampling;
mod single;
mod start;
mod unet_weights;

pub use few_step::SamplingDefaults;
pub use folder::{PipelineFolder, TextPart};
pub use generate::{GenerateRequest, Generated, ImageRequest, decode_with, generate, load_vae};
pub use image_channels::ImageChannels;
pub use image_input::PictureEncoder;
pub use lora_file::LoraFile;
pub use parts::ModelFiles;
pub use picture_file::Mask;
pub use prompt::{Guidance, IMAGE_GUIDANCE, PromptEmbedding, PromptEncoder, time_ids};
pub use prompt_options::PromptOptions;
pub use sampling::{Denoised, Predictor, sample, sample_from};
pub use start::Start;
pub use unet_weights::{StoredTensor, UnetSource, UnetWeights, verify};
