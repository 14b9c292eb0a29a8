//! The names of tensors in LoRA files, in the dialects of diffusers, kohya's scripts, LyCORIS and
//! the original checkpoints.

/// A network that a LoRA changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LoraPart {
    /// The UNet.
    Unet,
    /// `text_encoder`.
    TextEncoder,
    /// `text_encoder_2`.
    TextEncoder2,
}

/// A tensor's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    pub part: LoraPart,
    /// The module, with `_` in place of every dot, as kohya's scripts write it.
    pub module: String,
    pub piece: Piece,
}

/// The meaning of a tensor among those of its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Piece {
    /// LoRA: [r, i] or [r, i, kh, kw].
    Down,
    /// LoRA: [o, r] or [o, r, 1, 1].
    Up,
    /// LoRA of a convolution in Tucker's form: [r, r, kh, kw].
    Mid,
    /// The scale times the rank.
    Alpha,
    /// DoRA in peft's form: the norm of each output channel.
    Magnitude,
    /// DoRA in kohya's form: the norm of each output channel, [o, 1, ..], or of each input channel,
    /// [1, i, ..].
    DoraScale,
    /// LoHa: the factors A (`true`) and B of the first or second product.
    Hada(Side, bool),
    /// LoHa of a convolution in Tucker's form.
    HadaCore(Side),
    /// LoKr: a factor as it is.
    Kron(Side),
    /// LoKr: the factors A (`true`) and B of a factor.
    KronProduct(Side, bool),
    /// LoKr of a convolution in Tucker's form; only of the second factor.
    KronCore,
    /// The whole difference of the weight.
    Difference,
    /// The whole difference of the bias.
    BiasDifference,
}

/// One of two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Side {
    First,
    Second,
}

use Piece::{
    Alpha, BiasDifference, Difference, DoraScale, Down, Hada, HadaCore, Kron, KronCore, KronProduct, Magnitude, Mid, Up,
};
use Side::{First, Second};

/// Ends of names. None is the end of another but for the ones that name the old attention
/// processors of diffusers, which come last.
const ENDS: &[(&str, Piece)] = &[
    (".lora_A.weight", Down),
    (".lora_B.weight", Up),
    (".lora_A.default.weight", Down),
    (".lora_B.default.weight", Up),
    (".lora_down.weight", Down),
    (".lora_up.weight", Up),
    (".lora_mid.weight", Mid),
    (".lora.down.weight", Down),
    (".lora.up.weight", Up),
    (".alpha", Alpha),
    (".dora_scale", DoraScale),
    (".lora_magnitude_vector", Magnitude),
    (".lora_magnitude_vector.weight", Magnitude),
    (".lora_magnitude_vector.default.weight", Magnitude),
    (".hada_w1_a", Hada(First, true)),
    (".hada_w1_b", Hada(First, false)),
    (".hada_w2_a", Hada(Second, true)),
    (".hada_w2_b", Hada(Second, false)),
    (".hada_t1", HadaCore(First)),
    (".hada_t2", HadaCore(Second)),
    (".lokr_w1", Kron(First)),
    (".lokr_w2", Kron(Second)),
    (".lokr_w1_a", KronProduct(First, true)),
    (".lokr_w1_b", KronProduct(First, false)),
    (".lokr_w2_a", KronProduct(Second, true)),
    (".lokr_w2_b", KronProduct(Second, false)),
    (".lokr_t2", KronCore),
    (".diff", Difference),
    (".diff_b", BiasDifference),
];

/// Ends of the names of diffusers' attention processors (before 0.18).
const PROCESSOR_ENDS: &[(&str, Piece)] = &[("_lora.down.weight", Down), ("_lora.up.weight", Up)];

/// Beginnings of names.
const PARTS: &[(&str, LoraPart)] = &[
    ("unet.", LoraPart::Unet),
    ("lora_unet_", LoraPart::Unet),
    ("lycoris_unet_", LoraPart::Unet),
    ("model.diffusion_model.", LoraPart::Unet),
    ("diffusion_model.", LoraPart::Unet),
    ("text_encoder.", LoraPart::TextEncoder),
    ("lora_te1_", LoraPart::TextEncoder),
    ("lora_te_", LoraPart::TextEncoder),
    ("lycoris_te1_", LoraPart::TextEncoder),
    ("text_encoder_2.", LoraPart::TextEncoder2),
    ("lora_te2_", LoraPart::TextEncoder2),
    ("lycoris_te2_", LoraPart::TextEncoder2),
];

impl Key {
    /// Takes a tensor's name apart; `None` if it is of no known dialect.
    pub(super) fn parse(name: &str) -> Option<Key> {
        let bare = name.strip_prefix("base_model.model.").unwrap_or(name);
        let (part, rest) = PARTS.iter().find_map(|(begin, part)| Some((*part, bare.strip_prefix(begin)?)))?;
        let end = |ends: &[(&str, Piece)]| ends.iter().find_map(|(end, piece)| Some((rest.strip_suffix(end)?, *piece)));
        if let Some((module, piece)) = end(ENDS) {
            return Some(Key { part, module: underscored(module), piece });
        }
        let (module, piece) = end(PROCESSOR_ENDS)?;
        let (attention, projection) = module.split_once(".processor.")?;
        let projection = if projection == "to_out" { "to_out.0" } else { projection };
        Some(Key { part, module: underscored(&format!("{attention}.{projection}")), piece })
    }
}

/// A module's name as kohya's scripts write it.
pub(super) fn underscored(module: &str) -> String {
    module.replace('.', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_module_in_all_dialects() {
        let module = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0";
        for (name, piece) in [
            ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight", Down),
            ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.up.weight", Up),
            ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight", Down),
            ("base_model.model.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight", Up),
            ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight", Down),
            ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha", Alpha),
            ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lokr_w2_b", KronProduct(Second, false)),
            ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.diff_b", BiasDifference),
        ] {
            assert_eq!(Key::parse(name), Some(Key { part: LoraPart::Unet, module: module.to_owned(), piece }), "{name}");
        }
        let text = "lora_te2_text_model_encoder_layers_3_mlp_fc1.dora_scale";
        let key = Key::parse(text).unwrap();
        assert_eq!((key.part, key.module.as_str()), (LoraPart::TextEncoder2, "text_model_encoder_layers_3_mlp_fc1"));
        assert_eq!(Key::parse("lora_te_text_model_encoder_layers_3_mlp_fc1.alpha").unwrap().part, LoraPart::TextEncoder);
        for unknown in ["", "unet.", "conv_in.lora_A.weight", "unet.conv_in.weight", "lora_unet_conv_in.lora_left.weight"] {
            assert_eq!(Key::parse(unknown), None, "{unknown}");
        }
    }
}
