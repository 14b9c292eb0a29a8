//! A UNet as two Core ML packages in a folder.

use std::path::Path;

use sdxl_pipeline::UnetWeights;
use squeeze_base::error::{Error, Result};
use squeeze_base::output::NewFolder;
use squeeze_base::progress::Progress;
use squeeze_coreml::{Options, WrittenChunk, write_chunks};

/// The names of the two packages of a UNet without the ending: Apple's Swift pipeline looks for
/// them.
pub const CHUNKS: [&str; 2] = ["UnetChunk1", "UnetChunk2"];

/// Writes the UNet of `weights` as the two packages [`CHUNKS`] in the new folder `out`:
/// [`squeeze_coreml::write_chunks`].
///
/// # Errors
/// [`Error::Argument`] if `out` is there already or is named as a package; as
/// [`squeeze_coreml::write_chunks`]. Then there is no folder.
pub fn coreml_chunks(weights: UnetWeights, options: &Options, out: &Path, progress: &dyn Progress) -> Result<[WrittenChunk; 2]> {
    if out.extension() == Some("mlpackage".as_ref()) {
        let problem = "two packages are written into a folder, whose name must not end in .mlpackage";
        return Err(Error::Argument(format!("{}: {problem}", out.display())));
    }
    let folder = NewFolder::create(out)?;
    let written = coreml_chunks_in(weights, options, folder.path(), progress)?;
    folder.commit()?;
    Ok(written)
}

/// As [`coreml_chunks`], in a folder that is there and that the caller removes after an error.
pub(crate) fn coreml_chunks_in(
    weights: UnetWeights,
    options: &Options,
    folder: &Path,
    progress: &dyn Progress,
) -> Result<[WrittenChunk; 2]> {
    let [first, second] = CHUNKS.map(|name| folder.join(format!("{name}.mlpackage")));
    write_chunks(weights, options, [&first, &second], progress)
}
