//! Palettizes every large weight of a safetensors file by single values and by vectors, without
//! Hessians, and prints a table of bits and signal-to-noise ratios: for `benches/terrain.py`.
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use half::f16;
use sdxl_squeeze::checkpoint::{SafetensorsFile, read_tensor};
use sdxl_squeeze::codebook::{BitWidth, Grouping, PaletteOptions};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::solver::palette::palettize;
use sdxl_squeeze::{Error, Result};
use tch::Kind;

/// Smaller weights are not worth a palette of vectors.
const LEAST: usize = 1 << 14;

/// V, bits of an index, channels that share a palette (`None`: all).
const SETTINGS: [(usize, BitWidth, Option<usize>); 9] = [
    (1, BitWidth::Four, Some(16)),
    (2, BitWidth::Eight, None),
    (1, BitWidth::Three, Some(16)),
    (2, BitWidth::Six, None),
    (2, BitWidth::Six, Some(64)),
    (1, BitWidth::Two, Some(16)),
    (2, BitWidth::Four, None),
    (2, BitWidth::Four, Some(32)),
    (4, BitWidth::Eight, None),
];

fn main() -> Result<()> {
    sdxl_squeeze::init();
    let path: PathBuf =
        std::env::args_os().nth(1).map(PathBuf::from).ok_or_else(|| Error::Argument("usage: weight_palettes FILE".into()))?;
    let file = SafetensorsFile::open(&path)?;
    let mut weights = Vec::new();
    for name in file.entries().keys() {
        let weight = read_tensor(&file, name, Placement::CPU)?;
        let shape: Vec<usize> = weight.size().iter().map(|size| *size as usize).collect();
        // All settings take the same weights.
        if shape.len() >= 2 && shape[0].is_multiple_of(64) && weight.numel() >= LEAST {
            let half: Vec<f16> = Vec::try_from(&weight.f_to_kind(Kind::Half)?.f_flatten(0, -1)?)?;
            weights.push((name.clone(), shape, half));
        }
    }
    let elements: usize = weights.iter().map(|(_, _, half)| half.len()).sum();
    println!("{} weights, {elements} elements", weights.len());
    println!("| palettes | bits/weight | SNR of all, dB | mean SNR of a weight, dB |");
    println!("|---|---:|---:|---:|");
    for (vector_length, bits, group) in SETTINGS {
        let grouping = group.map_or(Grouping::PerTensor, |group_size| Grouping::PerGroupedChannel { group_size });
        let options = PaletteOptions { bits, grouping, vector_length, ..PaletteOptions::default() };
        let (mut energy, mut lost, mut ratios, mut stored) = (0.0, 0.0, 0.0, 0.0);
        for (name, shape, half) in &weights {
            let palettized = palettize(name, half, shape, None, &options)?;
            let square: f64 = half.iter().map(|value| f64::from(value.to_f32()).powi(2)).sum();
            energy += square;
            lost += palettized.squared_error;
            ratios += 10.0 * (square / palettized.squared_error).log10();
            let indices = half.len() / vector_length * usize::from(bits.bits());
            stored += (indices + 16 * palettized.codebook.palettes.len()) as f64;
        }
        let channels = group.map_or("all channels".to_owned(), |group| format!("{group} channels"));
        println!(
            "| V{vector_length}, {} bits, {channels} | {:.3} | {:.2} | {:.2} |",
            bits.bits(),
            stored / elements as f64,
            10.0 * (energy / lost).log10(),
            ratios / weights.len() as f64
        );
    }
    Ok(())
}
