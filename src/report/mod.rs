//! What a comparison found, as files for people and programs. Data in, files out: nothing here knows of models or solvers.
//!
//! - [`metrics`]: how close two pictures are
//! - [`comparison`]: the data, which is also `report.json`
//! - [`html`]: `report.html`, one page that needs no other file
//! - [`sheet`]: `sheet.png`, every picture beside every other
//! - [`table`]: the table as text

mod charts;
pub mod comparison;
mod font;
pub mod html;
mod markup;
pub mod metrics;
mod plot;
pub mod sheet;
pub mod table;

use std::path::{Path, PathBuf};

pub use comparison::{Comparison, Dense, Judged, LayerRow, Row, Spread, StageError};

use crate::error::{Error, Result};
use crate::output::write_file;

/// Where a report's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The page.
    pub html: PathBuf,
    /// The data.
    pub json: PathBuf,
    /// The contact sheet.
    pub sheet: PathBuf,
}

/// Writes `report.html`, `report.json` and `sheet.png` into `folder`, which is made if it is not there. Older ones are replaced.
///
/// # Errors
/// [`Error::Argument`] if a picture is not as large as it says, before anything is written; [`Error::Write`].
pub fn write(comparison: &Comparison, folder: &Path) -> Result<Written> {
    let page = html::page(comparison)?;
    let (sheet, _) = sheet::contact_sheet(comparison)?;
    std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
    let written = Written { html: folder.join("report.html"), json: folder.join("report.json"), sheet: folder.join("sheet.png") };
    write_file(&written.html, |out| out.write_all(page.as_bytes()))?;
    write_file(&written.json, |out| out.write_all(comparison.to_json().as_bytes()))?;
    sheet.write_png(&written.sheet, &[("Title", comparison.title.clone())])?;
    Ok(written)
}
