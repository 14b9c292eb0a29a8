//! Many prompts encoded in one batch.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use sdxl_model::text::ClipTokenizer;
use squeeze_base::error::{Error, Result};
use tch::Tensor;

use super::folder::PipelineFolder;
use super::prompt::{Guidance, PromptEmbedding, PromptEncoder, cut};

impl Guidance {
    /// Encodes many prompts at once, each as [`encode`](Self::encode) does: the guidances, in the
    /// order of the prompts, have the values of single ones but for rounding. Prompts of equally
    /// many pieces are one batch of the encoders, and the negative prompt is encoded once for them.
    ///
    /// # Errors
    /// If a text cannot be encoded.
    pub fn encode_all(
        encoder: &PromptEncoder,
        folder: &PipelineFolder,
        prompts: &[&str],
        negative_prompt: Option<&str>,
        scale: f64,
        size: (i64, i64),
    ) -> Result<Vec<Self>> {
        let mut embeddings: Vec<Option<PromptEmbedding>> = prompts.iter().map(|_| None).collect();
        let texts = prompts.iter().map(|prompt| IdsOfText::of(encoder, prompt)).collect::<Result<Vec<_>>>()?;
        let mut least = encoder.least_pieces.max(1);
        if encoder.options.long_prompts {
            least = least.max(IdsOfText::of(encoder, negative_prompt.unwrap_or_default())?.count());
        }
        let count_of = |text: &IdsOfText| if encoder.options.long_prompts { text.count().max(least) } else { least };
        let counts: BTreeSet<usize> = texts.iter().map(count_of).collect();
        for count in counts {
            let chosen: Vec<usize> = (0..texts.len()).filter(|index| count_of(&texts[*index]) == count).collect();
            let of_chosen: Vec<&IdsOfText> = chosen.iter().map(|index| &texts[*index]).collect();
            let all = encoder.encode_ids(&of_chosen, count)?;
            for (row, index) in (0..).zip(chosen) {
                let (states, pooled) = (all.states.f_narrow(0, row, 1)?, all.pooled.f_narrow(0, row, 1)?);
                embeddings[index] = Some(PromptEmbedding { states, pooled });
            }
        }
        // The encoded negative prompt, by its number of states.
        let negatives: RefCell<BTreeMap<i64, PromptEmbedding>> = RefCell::default();
        let negative = |like: &PromptEmbedding| {
            let length = like.states.size3()?.1;
            let known = negatives.borrow().get(&length).map(PromptEmbedding::shallow_clone);
            if let Some(known) = known {
                return Ok(known);
            }
            let encoded = encoder.negative(folder, negative_prompt, like)?;
            negatives.borrow_mut().insert(length, encoded.shallow_clone());
            Ok(encoded)
        };
        let of = |embedding: Option<PromptEmbedding>| {
            let positive = embedding.ok_or_else(|| Error::internal("a prompt of the batch was not encoded"))?;
            Guidance::of(folder, encoder.placement(), positive, &negative, scale, size)
        };
        embeddings.into_iter().map(of).collect()
    }
}

impl PromptEmbedding {
    /// The same tensors (no data is copied).
    fn shallow_clone(&self) -> Self {
        PromptEmbedding { states: self.states.shallow_clone(), pooled: self.pooled.shallow_clone() }
    }
}

/// The ids of a text's pieces, for each tokenizer.
struct IdsOfText(Vec<Vec<Vec<i64>>>);

impl IdsOfText {
    /// Tokenizes a text once with each tokenizer. A text is cut to one piece unless the encoder
    /// reads long prompts, or fills all prompts to several pieces.
    fn of(encoder: &PromptEncoder, text: &str) -> Result<Self> {
        encoder.say_of_brackets(text);
        let in_pieces = encoder.options.long_prompts || encoder.least_pieces > 1;
        let mut has_said = false;
        let mut ids = |tokenizer: &ClipTokenizer| match in_pieces {
            true => tokenizer.pieces(text),
            false => Ok(vec![cut(tokenizer, text, &mut has_said)?]),
        };
        Ok(IdsOfText(encoder.parts.iter().map(|(tokenizer, _)| ids(tokenizer)).collect::<Result<_>>()?))
    }

    /// The number of pieces of the tokenizer that makes most.
    fn count(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or(1)
    }
}

impl PromptEncoder {
    /// Encodes tokenized texts as one batch, each as `count` pieces, of which the last may be
    /// empty.
    fn encode_ids(&self, texts: &[&IdsOfText], count: usize) -> Result<PromptEmbedding> {
        let mut states = Vec::new();
        let mut pooled = None;
        for (part, (tokenizer, model)) in self.parts.iter().enumerate() {
            let empty = tokenizer.encode("")?.ids;
            let mut side_by_side = Vec::new();
            for piece in 0..count {
                let of_piece = |text: &&IdsOfText| text.0[part].get(piece).unwrap_or(&empty).clone();
                let ids: Vec<i64> = texts.iter().flat_map(of_piece).collect();
                let ids = Tensor::f_from_slice(&ids)?.f_view([texts.len() as i64, -1])?;
                let encoded = model.forward_skipping(&ids, self.options.clip_skip)?;
                side_by_side.push(encoded.penultimate);
                if piece == 0 {
                    pooled = encoded.pooled;
                }
            }
            states.push(Tensor::f_cat(&side_by_side, 1)?);
        }
        let pooled = pooled.ok_or_else(|| Error::internal("the last text encoder has no pooled projection"))?;
        Ok(PromptEmbedding { states: Tensor::f_cat(&states, -1)?, pooled })
    }
}
