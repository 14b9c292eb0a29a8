//! Letters for labels in pictures.
//!
//! They are drawn beforehand by `font/make_font.py`, so that labels are the same bytes everywhere and need no font on the machine.

use std::collections::HashMap;
use std::io::Cursor;
use std::path::Path;

use crate::error::{Error, Result};
use crate::picture::Picture;

/// Cells side by side in the order of the text `letters`, one row a face.
const ATLAS: &[u8] = include_bytes!("font/font.png");

/// Stands for letters that the font lacks.
const UNKNOWN: char = '\u{fffd}';

/// How thick letters are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Face {
    Regular,
    Bold,
}

/// Both faces, at one size.
#[derive(Debug)]
pub(super) struct Font {
    ink: Vec<u8>,
    stride: usize,
    cell: usize,
    height: usize,
    columns: HashMap<char, usize>,
    advances: [Vec<usize>; 2],
}

impl Font {
    /// Reads the built-in letters.
    ///
    /// # Errors
    /// [`Error::BadFile`] if they are damaged.
    pub(super) fn load() -> Result<Self> {
        Self::parse().map_err(|why| Error::bad_file(Path::new("src/report/font/font.png"), why))
    }

    fn parse() -> Result<Self, String> {
        let mut reader = png::Decoder::new(Cursor::new(ATLAS)).read_info().map_err(|why| why.to_string())?;
        let mut ink = vec![0; reader.output_buffer_size().ok_or("too large")?];
        let info = reader.next_frame(&mut ink).map_err(|why| why.to_string())?;
        let text = |keyword: &str| {
            let chunk = reader.info().utf8_text.iter().find(|chunk| chunk.keyword == keyword);
            chunk.and_then(|chunk| chunk.get_text().ok()).ok_or(format!("no {keyword}"))
        };
        let columns: HashMap<_, _> = text("letters")?.chars().enumerate().map(|(column, letter)| (letter, column)).collect();
        let advances = text("advances")?;
        let mut faces = advances.lines().map(|line| line.split(' ').map(|n| n.parse().unwrap_or(0)).collect::<Vec<usize>>());
        let advances = [faces.next().ok_or("no face")?, faces.next().ok_or("no bold face")?];
        let (stride, rows) = (info.width as usize, info.height as usize);
        let known = columns.len();
        if known == 0 || advances.iter().any(|face| face.len() != known) || info.color_type != png::ColorType::Grayscale {
            return Err("letters and advances disagree".into());
        }
        Ok(Font { ink, stride, cell: stride / known, height: rows / 2, columns, advances })
    }

    /// Pixels from one line to the next.
    pub(super) fn line_height(&self) -> u32 {
        self.height as u32
    }

    /// The pixels that `text` takes.
    pub(super) fn width(&self, face: Face, text: &str) -> u32 {
        text.chars().map(|letter| self.advance(face, self.column(letter)) as u32).sum()
    }

    /// Draws one line with its upper left corner at `left`, `top`; what lies outside `picture` is cut off.
    pub(super) fn draw(&self, picture: &mut Picture, face: Face, text: &str, left: u32, top: u32, colour: [u8; 3]) {
        let mut left = left as usize;
        for letter in text.chars() {
            let column = self.column(letter);
            for y in 0..self.height {
                let from = (face as usize * self.height + y) * self.stride + column * self.cell;
                for (x, ink) in self.ink.iter().skip(from).take(self.cell).enumerate().filter(|(_, ink)| **ink > 0) {
                    // A letter begins one pixel into its cell.
                    blend(picture, (left + x).wrapping_sub(1), top as usize + y, colour, *ink);
                }
            }
            left += self.advance(face, column);
        }
    }

    /// Breaks `text` between words into lines of at most `width` pixels. What does not fit into `lines` lines ends in `…`.
    pub(super) fn wrap(&self, face: Face, text: &str, width: u32, lines: usize) -> Vec<String> {
        let mut wrapped: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            match wrapped.last_mut() {
                Some(line) if self.width(face, &format!("{line} {word}")) <= width => {
                    line.push(' ');
                    line.push_str(word);
                }
                _ => wrapped.push(word.to_owned()),
            }
        }
        let cut = wrapped.len() > lines;
        wrapped.truncate(lines);
        let last = wrapped.len().saturating_sub(1);
        for (i, line) in wrapped.iter_mut().enumerate() {
            if self.width(face, line) > width || (cut && i == last) {
                while !line.is_empty() && self.width(face, &format!("{line}…")) > width {
                    line.pop();
                }
                *line = format!("{}…", line.trim_end());
            }
        }
        wrapped
    }

    fn column(&self, letter: char) -> usize {
        *self.columns.get(&letter).or_else(|| self.columns.get(&UNKNOWN)).unwrap_or(&0)
    }

    fn advance(&self, face: Face, column: usize) -> usize {
        self.advances[face as usize].get(column).copied().unwrap_or(0)
    }
}

/// Lays `colour` over a pixel, as opaque as `ink` says.
fn blend(picture: &mut Picture, x: usize, y: usize, colour: [u8; 3], ink: u8) {
    if x >= picture.width as usize {
        return;
    }
    let at = 3 * (y * picture.width as usize + x);
    if let Some(pixel) = picture.rgb.get_mut(at..at + 3) {
        for (value, new) in pixel.iter_mut().zip(colour) {
            let mixed = u32::from(*value) * (255 - u32::from(ink)) + u32::from(new) * u32::from(ink);
            *value = ((mixed + 127) / 255) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn letters_leave_ink_where_they_should() {
        let font = Font::load().unwrap();
        let mut picture = Picture { width: 40, height: 20, rgb: vec![255; 2400] };
        font.draw(&mut picture, Face::Bold, "H", 2, 0, [10, 20, 30]);
        let inked: Vec<_> = (0..800).filter(|i| picture.rgb[3 * i] < 255).map(|i| (i % 40, i / 40)).collect();
        let width = font.width(Face::Bold, "H") as usize;
        assert!(inked.iter().all(|(x, y)| (2..2 + width).contains(x) && (2..17).contains(y)));
        // Two upright strokes, full ink in the middle of each.
        assert!(picture.rgb.chunks(3).any(|pixel| pixel == [10, 20, 30]));
        let middle: Vec<_> = inked.iter().filter(|(_, y)| *y == 5).map(|(x, _)| *x).collect();
        assert!(middle.windows(2).any(|pair| pair[1] > pair[0] + 2), "{middle:?}");
    }

    #[test]
    fn unknown_letters_are_drawn_too() {
        let font = Font::load().unwrap();
        let mut picture = Picture { width: 20, height: 20, rgb: vec![255; 1200] };
        font.draw(&mut picture, Face::Regular, "猫", 0, 0, [0; 3]);
        assert!(picture.rgb.contains(&0));
        assert_ne!(font.width(Face::Regular, "i"), font.width(Face::Regular, "W"));
    }

    #[test]
    fn lines_break_between_words() {
        let font = Font::load().unwrap();
        let lines = font.wrap(Face::Regular, "an emoji of a cat face with very many words", 90, 2);
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("an emoji") && lines[1].ends_with('…'), "{lines:?}");
        assert!(font.wrap(Face::Regular, "  ", 90, 2).is_empty());
    }

    proptest! {
        #[test]
        fn no_text_overflows_or_panics(text in any::<String>(), width in 16u32..200, left in 0u32..60, top in 0u32..60) {
            let font = Font::load().unwrap();
            let lines = font.wrap(Face::Bold, &text, width, 3);
            prop_assert!(lines.len() <= 3);
            for line in &lines {
                prop_assert!(font.width(Face::Bold, line) <= width);
            }
            let mut picture = Picture { width: 30, height: 30, rgb: vec![255; 2700] };
            font.draw(&mut picture, Face::Bold, &text, left, top, [0; 3]);
            prop_assert_eq!(picture.rgb.len(), 2700);
        }
    }
}
