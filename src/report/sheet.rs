//! The contact sheet: the pictures of all models in one picture.

use sdxl_pipeline::picture::Picture;
use squeeze_base::error::Result;
use squeeze_base::number;

use super::comparison::{Comparison, Row};
use super::font::{Face, Font, LINE_HEIGHT};

/// Least length of a picture's longer side, in pixels; smaller pictures are enlarged.
const LEAST_CELL: u32 = 128;
/// Greatest length of a picture's longer side, in pixels; larger pictures are reduced.
const MOST_CELL: u32 = 384;
/// Pixels around everything.
const MARGIN: u32 = 16;
/// Pixels between pictures.
const GAP: u32 = 8;
/// Least and greatest width of the labels on the left, in pixels.
const LABELS: (u32, u32) = (120, 240);
/// Most lines of a prompt.
const PROMPT_LINES: usize = 3;
/// Most lines of a model's name.
const NAME_LINES: usize = 3;

const PAPER: [u8; 3] = [250, 250, 248];
const FRAME: [u8; 3] = [222, 221, 216];
const INK: [u8; 3] = [28, 28, 26];
const FAINT: [u8; 3] = [104, 103, 98];

/// Layout of a [`contact_sheet`], in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Left edge of the first picture.
    pub left: u32,
    /// Upper edge of the first picture.
    pub top: u32,
    /// Width and height of the largest picture as shown. Smaller pictures are centred in as much
    /// room.
    pub cell: (u32, u32),
    /// Distance between the left edges of neighbours.
    pub across: u32,
    /// Distance between the upper edges of neighbours.
    pub down: u32,
}

/// A row of the sheet.
struct Line<'a> {
    name: &'a str,
    facts: Vec<String>,
    pictures: Vec<Picture>,
}

/// Draws the sheet: a row for each model, the dense one first, and a column for each judged prompt.
/// The label of a row has the model's name, size and PSNR.
///
/// # Errors
/// [`Error::Argument`](squeeze_base::Error::Argument) if a picture's bytes do not match its size,
/// or the sheet would have more than 2^31 bytes.
pub fn contact_sheet(comparison: &Comparison) -> Result<(Picture, Layout)> {
    let font = Font::load();
    let mut lines = vec![Line {
        name: &comparison.dense.name,
        facts: vec![number::size(comparison.dense.bytes)],
        pictures: shown(&comparison.dense.pictures)?,
    }];
    for row in &comparison.rows {
        lines.push(Line { name: &row.name, facts: facts(row, comparison.dense.bytes), pictures: shown(&row.pictures)? });
    }

    let columns = lines.iter().map(|line| line.pictures.len()).max().unwrap_or(0) as u32;
    let all = || lines.iter().flat_map(|line| &line.pictures);
    let (width, height) = (all().map(|p| p.width).max().unwrap_or(0), all().map(|p| p.height).max().unwrap_or(0));
    let labels = lines.iter().map(|line| label_width(&font, line)).max().unwrap_or(0).clamp(LABELS.0, LABELS.1);
    let prompts: Vec<_> = comparison
        .judged
        .iter()
        .take(columns as usize)
        .map(|judged| font.wrap(Face::Regular, &judged.prompt, width, PROMPT_LINES))
        .collect();
    let prompt_lines = prompts.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let texts = lines.iter().map(|line| font.wrap(Face::Bold, line.name, labels, NAME_LINES).len() + line.facts.len()).max();
    let row_height = height.max(texts.unwrap_or(0) as u32 * LINE_HEIGHT);

    let layout = Layout {
        left: MARGIN + labels + 2 * GAP,
        top: MARGIN + prompt_lines * LINE_HEIGHT + GAP,
        cell: (width, height),
        across: width + GAP,
        down: row_height + GAP,
    };
    let mut sheet = blank(
        layout.left + (columns * layout.across).saturating_sub(GAP) + MARGIN,
        layout.top + lines.len() as u32 * layout.down - GAP + MARGIN,
    )?;
    for (column, prompt) in prompts.iter().enumerate() {
        // The last line is right above the picture.
        let above = prompt.len() as u32 * LINE_HEIGHT;
        for (i, line) in prompt.iter().enumerate() {
            let left = layout.left + column as u32 * layout.across;
            font.draw(&mut sheet, Face::Regular, line, left, layout.top - 4 - above + i as u32 * LINE_HEIGHT, FAINT);
        }
    }
    for (i, line) in lines.iter().enumerate() {
        let top = layout.top + i as u32 * layout.down;
        let name = font.wrap(Face::Bold, line.name, labels, NAME_LINES).into_iter().map(|text| (Face::Bold, text, INK));
        let facts = line.facts.iter().map(|fact| (Face::Regular, fact.clone(), FAINT));
        for (j, (face, text, colour)) in name.chain(facts).enumerate() {
            font.draw(&mut sheet, face, &text, MARGIN, top + j as u32 * LINE_HEIGHT, colour);
        }
        for (column, picture) in line.pictures.iter().enumerate() {
            let left = layout.left + column as u32 * layout.across + (width - picture.width) / 2;
            place(&mut sheet, picture, left, top + (height - picture.height) / 2);
        }
    }
    Ok((sheet, layout))
}

/// The lines below a row's name.
fn facts(row: &Row, dense: u64) -> Vec<String> {
    let mut facts = vec![number::size(row.bytes)];
    if dense > 0 {
        facts.push(format!("{:.1}% of dense", 100.0 * row.bytes as f64 / dense as f64));
    }
    if row.psnr.mean.is_finite() {
        facts.push(format!("PSNR {:.1} dB", row.psnr.mean));
        facts.push(format!("worst {:.1} dB", row.psnr.worst));
    }
    facts
}

fn label_width(font: &Font, line: &Line) -> u32 {
    let facts = line.facts.iter().map(|fact| font.width(Face::Regular, fact)).max().unwrap_or(0);
    facts.max(font.width(Face::Bold, line.name))
}

fn shown(pictures: &[Picture]) -> Result<Vec<Picture>> {
    pictures.iter().map(|picture| fit(picture, LEAST_CELL, MOST_CELL)).collect()
}

/// Enlarges or reduces `picture` by a whole number, so that its longer side has at least `least`
/// pixels (by repeating pixels) and at most `most` (by averaging blocks; pixels on the right and
/// below that fill no block are cut off).
///
/// # Errors
/// [`Error::Argument`](squeeze_base::Error::Argument) if the picture's bytes do not match its size.
pub(super) fn fit(picture: &Picture, least: u32, most: u32) -> Result<Picture> {
    picture.check()?;
    let longer = picture.width.max(picture.height);
    let (up, down) = (least.div_ceil(longer).max(1), longer.div_ceil(most.max(1)).max(1));
    if up > 1 {
        let (width, height) = (picture.width * up, picture.height * up);
        let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(picture, x / up, y / up))).collect();
        return Ok(Picture { width, height, rgb });
    }
    if down == 1 {
        return Ok(picture.clone());
    }
    let (width, height) = ((picture.width / down).max(1), (picture.height / down).max(1));
    let mut rgb = Vec::with_capacity(3 * width as usize * height as usize);
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        let mut sums = [0u32; 3];
        let mut count = 0;
        for (v, u) in (y * down..(y + 1) * down).flat_map(|v| (x * down..(x + 1) * down).map(move |u| (v, u))) {
            if u < picture.width && v < picture.height {
                pixel(picture, u, v).iter().zip(&mut sums).for_each(|(value, sum)| *sum += u32::from(*value));
                count += 1;
            }
        }
        rgb.extend(sums.map(|sum| ((sum + count / 2) / count.max(1)) as u8));
    }
    Ok(Picture { width, height, rgb })
}

/// A pixel of a checked picture.
fn pixel(picture: &Picture, x: u32, y: u32) -> [u8; 3] {
    let at = 3 * (y as usize * picture.width as usize + x as usize);
    [picture.rgb[at], picture.rgb[at + 1], picture.rgb[at + 2]]
}

fn blank(width: u32, height: u32) -> Result<Picture> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels * 3 > 1 << 31 {
        return Err(squeeze_base::Error::Argument(format!(
            "a contact sheet of {width}x{height} pixels is too large; compare fewer pictures"
        )));
    }
    Ok(Picture { width, height, rgb: PAPER.repeat(pixels as usize) })
}

/// Copies `picture` onto the sheet, inside of its margins, and draws a line of one pixel around it.
fn place(sheet: &mut Picture, picture: &Picture, left: u32, top: u32) {
    let stride = 3 * sheet.width as usize;
    let start = |x: u32, y: u32| y as usize * stride + 3 * x as usize;
    let row = 3 * picture.width as usize;
    for (y, pixels) in (top..).zip(picture.rgb.chunks_exact(row)) {
        sheet.rgb[start(left, y)..start(left, y) + row].copy_from_slice(pixels);
    }
    let (right, bottom) = (left + picture.width, top + picture.height);
    let level = (left - 1..=right).flat_map(|x| [(x, top - 1), (x, bottom)]);
    let upright = (top..bottom).flat_map(|y| [(left - 1, y), (right, y)]);
    for (x, y) in level.chain(upright) {
        sheet.rgb[start(x, y)..start(x, y) + 3].copy_from_slice(&FRAME);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::comparison::{Dense, Judged, Spread};

    fn flat(side: u32, colour: [u8; 3]) -> Picture {
        Picture { width: side, height: side, rgb: colour.repeat((side * side) as usize) }
    }

    fn comparison(side: u32) -> Comparison {
        let judged = |prompt: &str| Judged { prompt: prompt.into(), seed: 1 };
        let row = |name: &str, colour: [u8; 3]| Row {
            name: name.into(),
            bytes: 1 << 20,
            psnr: Spread::of(vec![30.0, 20.0]),
            pictures: vec![flat(side, colour), flat(side, [9; 3])],
            ..Row::default()
        };
        Comparison {
            judged: vec![
                judged("a cat"),
                judged("a picture of a dog with a very long name that needs many lines to be said at all"),
            ],
            dense: Dense {
                name: "dense".into(),
                bytes: 1 << 22,
                pictures: vec![flat(side, [1, 2, 3]), flat(side, [4, 5, 6])],
                ..Dense::default()
            },
            rows: vec![row("first", [200, 0, 0]), row("second", [0, 200, 0])],
            ..Comparison::default()
        }
    }

    fn at(sheet: &Picture, x: u32, y: u32) -> [u8; 3] {
        pixel(sheet, x, y)
    }

    #[test]
    fn pictures_stand_where_the_layout_says() {
        let (sheet, layout) = contact_sheet(&comparison(64)).unwrap();
        sheet.check().unwrap();
        assert_eq!(layout.cell, (128, 128));
        assert_eq!(sheet.width, layout.left + 2 * layout.across - GAP + MARGIN);
        assert_eq!(sheet.height, layout.top + 3 * layout.down - GAP + MARGIN);
        let middle = |row: u32, column: u32| (layout.left + column * layout.across + 64, layout.top + row * layout.down + 64);
        let colours = [[[1, 2, 3], [4, 5, 6]], [[200, 0, 0], [9; 3]], [[0, 200, 0], [9; 3]]];
        for (row, expected) in (0..).zip(colours) {
            for (column, colour) in (0..).zip(expected) {
                let (x, y) = middle(row, column);
                for (dx, dy) in [(0, 0), (-64, -64), (63, 63), (-64, 63)] {
                    assert_eq!(at(&sheet, x.wrapping_add_signed(dx), y.wrapping_add_signed(dy)), colour);
                }
                assert_eq!(at(&sheet, x - 65, y), FRAME);
                assert_eq!(at(&sheet, x, y + 64), FRAME);
                assert_eq!(at(&sheet, x + 66, y), PAPER);
            }
        }
        assert_eq!(at(&sheet, 0, 0), PAPER);
        let label = |row: u32| {
            let top = layout.top + row * layout.down;
            (top..top + 18).any(|y| (MARGIN..layout.left - GAP).any(|x| at(&sheet, x, y) != PAPER))
        };
        assert!((0..3).all(label));
    }

    #[test]
    fn pictures_grow_and_shrink_by_whole_numbers() {
        let two = Picture { width: 2, height: 1, rgb: vec![0, 10, 20, 100, 110, 120] };
        let grown = fit(&two, 4, 8).unwrap();
        assert_eq!((grown.width, grown.height), (4, 2));
        assert_eq!(grown.rgb, [[0u8, 10, 20], [0, 10, 20], [100, 110, 120], [100, 110, 120]].concat().repeat(2));
        let shrunk = fit(&two, 1, 1).unwrap();
        assert_eq!((shrunk.width, shrunk.height, shrunk.rgb.as_slice()), (1, 1, &[50, 60, 70][..]));
        assert_eq!(fit(&two, 1, 2).unwrap(), two);
        assert!(fit(&Picture { width: 2, height: 2, rgb: vec![0; 3] }, 1, 2).is_err());
    }

    #[test]
    fn odd_comparisons_give_sheets_too() {
        contact_sheet(&Comparison::default()).unwrap().0.check().unwrap();
        let mut uneven = comparison(64);
        uneven.rows[0].pictures = vec![flat(16, [7; 3])];
        uneven.rows[1].pictures.clear();
        uneven.judged.clear();
        let (sheet, layout) = contact_sheet(&uneven).unwrap();
        assert_eq!(at(&sheet, layout.left + 64, layout.top + layout.down + 64), [7; 3]);
        assert_eq!(at(&sheet, layout.left + 64, layout.top + 2 * layout.down + 64), PAPER);
        assert_eq!(contact_sheet(&comparison(1024)).unwrap().1.cell, (341, 341));
    }
}
