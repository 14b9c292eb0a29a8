//! The measures with their confidence intervals, and each config's difference to the baseline, as
//! cells for every kind of table.

use squeeze_base::number;

use super::comparison::{Comparison, Estimate, Measures, Row};
use super::grid::Grid;

/// How a measure is written.
#[derive(Clone, Copy)]
struct Column {
    title: &'static str,
    of: fn(&Measures) -> Option<Estimate>,
    scale: f64,
    decimals: usize,
}

const COLUMNS: [Column; 5] = [
    Column { title: "UNet error, %", of: |measures| Some(measures.unet_error), scale: 100.0, decimals: 3 },
    Column { title: "latent error, %", of: |measures| Some(measures.latent_error), scale: 100.0, decimals: 3 },
    Column { title: "PSNR, dB", of: |measures| Some(measures.psnr), scale: 1.0, decimals: 2 },
    Column { title: "SSIM", of: |measures| Some(measures.ssim), scale: 1.0, decimals: 4 },
    Column { title: "LPIPS", of: |measures| measures.lpips, scale: 1.0, decimals: 4 },
];

/// The intervals of a comparison; `None` if no row has any.
#[must_use]
pub fn intervals(comparison: &Comparison) -> Option<Grid> {
    let rows: Vec<&Row> = comparison.noise_floor.iter().chain(&comparison.rows).filter(|row| row.intervals.is_some()).collect();
    if rows.is_empty() {
        return None;
    }
    let shown = |column: &&Column| rows.iter().any(|row| row.intervals.as_ref().is_some_and(|all| (column.of)(all).is_some()));
    let columns: Vec<Column> = COLUMNS.iter().filter(shown).copied().collect();
    let is_compared = rows.iter().any(|row| row.differences.is_some());
    let mut header = vec!["config".to_owned()];
    for column in &columns {
        header.push(column.title.to_owned());
        header.extend(is_compared.then(|| "difference".to_owned()));
    }
    let cell = |measures: Option<&Measures>, column: &Column, signed: bool| {
        measures.and_then(column.of).map_or_else(|| number::NONE.to_owned(), |estimate| estimate_text(&estimate, column, signed))
    };
    let line = |row: &&Row| {
        let mut cells = vec![row.name.clone()];
        for column in &columns {
            cells.push(cell(row.intervals.as_ref(), column, false));
            cells.extend(is_compared.then(|| cell(row.differences.as_ref(), column, true)));
        }
        cells
    };
    let compared = if is_compared { format!("; differences to {}", comparison.baseline) } else { String::new() };
    Some(Grid { title: format!("Means with 95 % confidence intervals{compared}"), header, rows: rows.iter().map(line).collect() })
}

/// For example `29.55 [28.90, 30.21]`, or `+0.40 [+0.12, +0.71]`.
fn estimate_text(estimate: &Estimate, column: &Column, signed: bool) -> String {
    let text = |value: f64| {
        let value = column.scale * value;
        if signed && value.is_finite() { format!("{value:+.*}", column.decimals) } else { number::fixed(value, column.decimals) }
    };
    format!("{} [{}, {}]", text(estimate.value), text(estimate.low), text(estimate.high))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measures(psnr: f64) -> Measures {
        let estimate = |value: f64| Estimate { value, low: value - 0.001, high: value + 0.002 };
        let error = estimate(0.02);
        Measures { unet_error: error, latent_error: error, psnr: estimate(psnr), ssim: estimate(0.9), lpips: None }
    }

    #[test]
    fn a_table_has_the_columns_that_were_measured() {
        let row =
            |name: &str, differences| Row { name: name.into(), intervals: Some(measures(30.0)), differences, ..Row::default() };
        let mut comparison = Comparison { rows: vec![row("a", None)], ..Comparison::default() };
        let alone = intervals(&comparison).unwrap();
        assert_eq!(alone.header, ["config", "UNet error, %", "latent error, %", "PSNR, dB", "SSIM"]);
        assert_eq!(alone.rows[0][1], "2.000 [1.900, 2.200]");
        comparison.rows.push(row("b", Some(measures(-0.5))));
        comparison.baseline = "a".into();
        let both = intervals(&comparison).unwrap();
        assert!(both.title.ends_with("differences to a"));
        assert_eq!(both.header.len(), 9);
        assert_eq!(both.rows[0][6], number::NONE);
        assert_eq!(both.rows[1][6], "-0.50 [-0.50, -0.50]");
        assert_eq!(both.rows[1][8], "+0.9000 [+0.8990, +0.9020]");
        assert_eq!(intervals(&Comparison { rows: vec![Row::default()], ..Comparison::default() }), None);
    }
}
