//! The name of a LoRA file with the factor of its changes.

use std::convert::Infallible;
use std::fmt::{self, Display};
use std::path::PathBuf;
use std::str::FromStr;

/// A LoRA file and the factor of its changes, written `FILE` or `FILE:SCALE`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFile {
    /// The file.
    pub path: PathBuf,
    /// The factor; 1 where none is written.
    pub scale: f64,
}

impl FromStr for LoraFile {
    type Err = Infallible;

    /// What stands after the last colon is the scale if it is a number; else it belongs to the
    /// path.
    fn from_str(written: &str) -> Result<Self, Infallible> {
        let scaled = written.rsplit_once(':').and_then(|(path, scale)| Some((path, scale.trim().parse().ok()?)));
        let (path, scale) = scaled.unwrap_or((written, 1.0));
        Ok(LoraFile { path: path.into(), scale })
    }
}

impl Display for LoraFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The scale is written where a path would be read with another one without it.
        let path = self.path.display().to_string();
        let is_plain = path.parse::<LoraFile>().is_ok_and(|read| read == *self);
        if is_plain { f.write_str(&path) } else { write!(f, "{path}:{}", self.scale) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_what_follows_the_last_colon_and_is_a_number() {
        for (written, path, scale) in [
            ("a.safetensors", "a.safetensors", 1.0),
            ("a.safetensors:0.5", "a.safetensors", 0.5),
            ("C:/a.safetensors", "C:/a.safetensors", 1.0),
            ("C:/a.safetensors:-1", "C:/a.safetensors", -1.0),
            ("a:1:2", "a:1", 2.0),
            ("a:", "a:", 1.0),
        ] {
            let read: LoraFile = written.parse().unwrap();
            assert_eq!(read, LoraFile { path: path.into(), scale }, "{written}");
            assert_eq!(read.to_string().parse::<LoraFile>().unwrap(), read, "{written}");
        }
    }
}
