//! The result of a comparison as files for people and programs: data in, files out, without models
//! or solvers.
//!
//! - [`metrics`]: measures of how close two pictures are
//! - [`comparison`]: the data, which is also `report.json`
//! - [`html`]: `report.html`, a page that needs no other file
//! - [`sheet`]: `sheet.png`, a contact sheet of all pictures
//! - [`table`]: the table as text
//! - [`intervals`]: the measures with their confidence intervals, and differences to a baseline
//! - [`curve`]: the error against size of a sweep, which is also `curve.svg`
//! - [`grid`]: tables of cells, such as those of the two before

mod axis;
mod charts;
pub mod comparison;
pub mod curve;
mod font;
pub mod grid;
pub mod html;
pub mod intervals;
mod markup;
pub mod metrics;
mod plot;
pub mod sheet;
pub mod table;

use std::path::{Path, PathBuf};

pub use comparison::{Comparison, Dense, Estimate, Judged, LayerRow, Measures, Row, Spread, StageError};
pub(crate) use comparison::{or_nan, or_nans};
use squeeze_base::error::{Error, Result};
use squeeze_base::output::write_file;

/// Paths of a report's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// `report.html`, the page.
    pub html: PathBuf,
    /// `report.json`, the data.
    pub json: PathBuf,
    /// `sheet.png`, the contact sheet.
    pub sheet: PathBuf,
    /// `curve.svg`, the error against size, if the comparison has curves.
    pub curve: Option<PathBuf>,
}

/// Writes `report.html`, `report.json` and `sheet.png` into `folder`, and `curve.svg` if there are
/// curves. Creates the folder if need be. Existing files of these names are replaced.
///
/// # Errors
/// [`Error::Argument`] if a picture's bytes do not match its size, before anything is written;
/// [`Error::Write`].
pub fn write(comparison: &Comparison, folder: &Path) -> Result<Written> {
    let page = html::page(comparison)?;
    let (sheet, _) = sheet::contact_sheet(comparison)?;
    std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
    let [html, json, sheet_path, curve] = ["report.html", "report.json", "sheet.png", "curve.svg"].map(|name| folder.join(name));
    let curve = curve::write_svg(comparison, &curve)?.then_some(curve);
    let written = Written { html, json, sheet: sheet_path, curve };
    write_file(&written.html, |out| out.write_all(page.as_bytes()))?;
    write_file(&written.json, |out| out.write_all(comparison.to_json().as_bytes()))?;
    sheet.write_png(&written.sheet, &[("Title", comparison.title.clone())])?;
    Ok(written)
}
