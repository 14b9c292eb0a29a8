//! Files that are no SDXL checkpoint, told apart so that the refusal can say what to do.

use safetensors::Dtype;
use squeeze_base::error::{Error, Result};
use squeeze_base::safetensors_file::SafetensorsFile;

/// Refuses other models, and SDXL in forms that are not read.
///
/// # Errors
/// [`Error::BadFile`] that names the model or the form and the remedy.
pub(super) fn by_tensors(file: &SafetensorsFile) -> Result<()> {
    let entries = file.entries();
    let any = |is: &dyn Fn(&str) -> bool| entries.keys().any(|name| is(name));
    let has = |name: &str| any(&|key| key.ends_with(name));
    let starts = |prefix: &str| any(&|key| key.strip_prefix("model.diffusion_model.").unwrap_or(key).starts_with(prefix));
    let is_fp8 = entries.values().any(|entry| matches!(entry.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0));
    let is_lora = any(&|key| {
        ["lora_unet_", "lora_te", "lycoris_"].iter().any(|prefix| key.starts_with(prefix))
            || [".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down."]
                .iter()
                .any(|part| key.contains(part))
    });
    // The width of the text states: 768 in SD 1, 1024 in SD 2, 2048 in SDXL base.
    let context = entries
        .iter()
        .find(|(name, _)| name.ends_with("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"))
        .and_then(|(_, entry)| entry.shape.last().copied());
    let is_sdxl = starts("label_emb.");
    let is_sd1 = !is_sdxl && (starts("cond_stage_model.transformer.") || context == Some(768));
    let is_sd2 = !is_sdxl && (starts("cond_stage_model.model.") || context == Some(1024));
    let problem = if file.metadata().get("format").is_some_and(|format| format == "sdxl-squeeze") {
        "is a container of this program, not a model; give the model that it was made from, and the container as --unet"
    } else if has(".quant_state.bitsandbytes__nf4") || has(".quant_state.bitsandbytes__fp4") || has(".absmax") {
        "is an NF4 or FP4 checkpoint, whose weights are quantized already; take the fp16 version of the model"
    } else if is_fp8 || has("scaled_fp8") || has(".scale_weight") || has(".weight_scale") || has(".scale_input") {
        "is an fp8 checkpoint, whose weights have lost most of their digits; take the fp16 or bf16 version of the model"
    } else if is_lora {
        "is a LoRA, which changes a model and is none; give it to --lora, and its model to --model"
    } else if starts("double_blocks.") || starts("single_transformer_blocks.") {
        "is a Flux model; only the SDXL family is read"
    } else if starts("joint_blocks.") {
        "is a Stable Diffusion 3 model; only the SDXL family is read"
    } else if starts("control_model.") || starts("controlnet_cond_embedding.") || starts("zero_convs.") {
        "is a ControlNet, not a model; give the SDXL model that it is used with"
    } else if is_sd1 {
        "is a Stable Diffusion 1 model; only the SDXL family is read"
    } else if is_sd2 {
        "is a Stable Diffusion 2 model; only the SDXL family is read"
    } else {
        return Ok(());
    };
    Err(Error::bad_file(file.path(), problem))
}
