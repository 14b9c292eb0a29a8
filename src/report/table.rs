//! The comparison's table as text: for a terminal, and as Markdown.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use squeeze_base::number;

use super::comparison::{Comparison, Row};
use super::curve::sizes;
use super::grid::Grid;
use super::intervals::intervals;

/// Titles of the columns; all but the first are of numbers.
const HEADER: [&str; 12] =
    ["config", "size", "bytes", "sparsity", "bits/weight", "UNet error", "PSNR", "worst", "SSIM", "worst", "time", "memory"];

/// The table for a terminal: right-aligned numbers, the dense model first.
#[must_use]
pub fn plain(comparison: &Comparison) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(HEADER);
    for cells in rows(comparison) {
        table.add_row(cells.map(|cell| cell.replace(char::is_control, " ")));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("{}\n", table.trim_fmt());
    for grid in further(comparison) {
        text.push_str(&format!("\n{}", grid.plain()));
    }
    text
}

/// The tables after the first: sizes of a sweep and intervals, if there are any.
fn further(comparison: &Comparison) -> impl Iterator<Item = Grid> {
    sizes(comparison).into_iter().chain(intervals(comparison))
}

/// The table as Markdown, the dense model first, and further tables with the sizes of a sweep and
/// with intervals if there are any.
pub fn markdown(comparison: &Comparison) -> String {
    let escaped = |cells: &[String; HEADER.len()]| cells.iter().map(|cell| markdown_text(cell)).collect::<Vec<_>>();
    let lines = rows(comparison).map(|cells| escaped(&cells));
    let mut text = markdown_table(&HEADER.map(str::to_owned), lines);
    for Grid { title, header, rows } in further(comparison) {
        let lines = rows.iter().map(|cells| cells.iter().map(|cell| markdown_text(cell)).collect());
        let header: Vec<String> = header.iter().map(|title| markdown_text(title)).collect();
        text.push_str(&format!("\n{}:\n\n", markdown_text(&title)));
        text.push_str(&markdown_table(&header, lines));
    }
    text
}

/// A table whose first column is of names, and all others of numbers.
fn markdown_table(header: &[String], lines: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(header);
    text.push_str("|---|");
    text.push_str(&"---:|".repeat(header.len() - 1));
    text.push('\n');
    lines.for_each(|cells| text.push_str(&line(&cells)));
    text
}

fn rows(comparison: &Comparison) -> impl Iterator<Item = [String; HEADER.len()]> {
    let dense = &comparison.dense;
    let none = || number::NONE.to_owned();
    let first = [
        dense.name.clone(),
        number::size(dense.bytes),
        number::count(dense.bytes),
        none(),
        number::fixed(dense.bits_per_weight, 2),
        none(),
        none(),
        none(),
        none(),
        none(),
        none(),
        none(),
    ];
    std::iter::once(first).chain(comparison.noise_floor.iter().chain(&comparison.rows).map(cells))
}

fn cells(row: &Row) -> [String; HEADER.len()] {
    // The noise floor has no file.
    let size = |text: fn(u64) -> String| if row.bytes == 0 { number::NONE.into() } else { text(row.bytes) };
    [
        row.name.clone(),
        size(number::size),
        size(number::count),
        number::percent(row.sparsity_stored),
        number::fixed(row.bits_per_weight, 2),
        number::percent(row.unet_error),
        number::fixed(row.psnr.mean, 2),
        number::fixed(row.psnr.worst, 2),
        number::fixed(row.ssim.mean, 4),
        number::fixed(row.ssim.worst, 4),
        number::time(row.seconds),
        row.peak_bytes.map_or_else(|| number::NONE.into(), number::size),
    ]
}

/// `text` with Markdown's special characters escaped.
fn markdown_text(text: &str) -> String {
    let mut safe = String::new();
    for letter in text.chars() {
        match letter {
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '#' => safe.extend(['\\', letter]),
            '<' => safe.push_str("&lt;"),
            '&' => safe.push_str("&amp;"),
            letter if letter.is_control() => safe.push(' '),
            letter => safe.push(letter),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::comparison::{Dense, Spread};

    fn comparison() -> Comparison {
        let row = Row {
            name: "a|b <i>\n*c*".into(),
            bytes: 2_202_010,
            sparsity_stored: 0.4,
            bits_per_weight: 3.4,
            unet_error: 0.0412,
            psnr: Spread::of(vec![30.0, 20.5]),
            ssim: Spread::of(vec![0.9, 0.8]),
            seconds: 7.0,
            ..Row::default()
        };
        let dense = Dense { name: "dense fp16".into(), bytes: 5_134_927_368, bits_per_weight: 16.0, ..Dense::default() };
        Comparison { dense, rows: vec![row], ..Comparison::default() }
    }

    #[test]
    fn a_terminal_gets_aligned_numbers() {
        let text = plain(&comparison());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].contains("4.782 GiB") && lines[1].contains("5,134,927,368"));
        assert!(lines[2].contains("4.12%") && lines[2].contains("25.25") && lines[2].contains("7.0 s"));
        let end = |line: &str, word: &str| line.find(word).map(|at| line[..at].chars().count() + word.chars().count());
        assert_eq!(end(lines[1], "5,134,927,368"), end(lines[2], "2,202,010"));
    }

    #[test]
    fn markdown_has_as_many_cells_in_every_line() {
        let text = markdown(&comparison());
        let cells = |line: &str| line.replace("\\|", "").matches('|').count();
        assert_eq!(text.lines().count(), 4);
        assert!(text.lines().all(|line| cells(line) == HEADER.len() + 1), "{text}");
        assert!(text.contains("a\\|b &lt;i> \\*c\\* | 2.10 MiB"), "{text}");
    }
}
