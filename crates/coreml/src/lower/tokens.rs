//! Pictures as tokens, and back.

use squeeze_base::error::Result;

use super::Network;
use crate::options::Layout;
use crate::program::Var;

impl Network<'_> {
    /// [b, c, h, w] to tokens of the layout.
    pub(super) fn tokens(&mut self, name: &str, x: &Var) -> Result<Var> {
        let [batch, channels, height, width] = x.dims(name)?;
        let tokens = format!("{name}.tokens");
        match self.layout {
            Layout::Linear => {
                let last = self.transpose(&format!("{name}.channels_last"), x, &[0, 2, 3, 1])?;
                self.reshape(&tokens, &last, &[batch, height * width, channels])
            }
            Layout::SplitEinsum => self.reshape(&tokens, x, &[batch, channels, 1, height * width]),
        }
    }

    /// Tokens to [b, c, h, w].
    pub(super) fn image(&mut self, name: &str, x: &Var, pixels: [u64; 4]) -> Result<Var> {
        let [batch, channels, height, width] = pixels;
        let image = format!("{name}.image");
        match self.layout {
            Layout::Linear => {
                let last = self.reshape(&format!("{name}.pixels"), x, &[batch, height, width, channels])?;
                self.transpose(&image, &last, &[0, 3, 1, 2])
            }
            Layout::SplitEinsum => self.reshape(&image, x, &pixels),
        }
    }
}
