//! The pieces of 77 tokens in which long prompts are encoded.

use squeeze_base::error::{Error, Result};

use super::folder::PipelineFolder;
use super::prompt_options::PromptOptions;

impl PromptOptions {
    /// The number of pieces of the longest of `texts`; 1 unless these options encode in pieces.
    ///
    /// # Errors
    /// If a tokenizer cannot be read.
    pub fn pieces<'a>(self, folder: &PipelineFolder, texts: impl Iterator<Item = &'a str> + Clone) -> Result<usize> {
        let mut most = 1;
        if self.long_prompts {
            for part in &folder.text_encoders {
                let tokenizer = folder.tokenizer(part)?;
                for text in texts.clone() {
                    most = most.max(tokenizer.pieces(text)?.len());
                }
            }
        }
        Ok(most)
    }

    /// Checks that the text encoders have more layers than are left out.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the encoder.
    pub fn check(self, folder: &PipelineFolder) -> Result<()> {
        let has_few = |layers: usize| layers <= self.clip_skip;
        match folder.text_encoders.iter().find(|part| has_few(part.config.num_hidden_layers)) {
            None => Ok(()),
            Some(part) => {
                let (skip, layers) = (self.clip_skip, part.config.num_hidden_layers);
                Err(Error::Argument(format!("clip_skip {skip} leaves no layer of {}, which has {layers}", part.encoder)))
            }
        }
    }
}
