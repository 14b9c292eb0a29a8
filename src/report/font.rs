//! Text in pictures, for the labels of the contact sheet.
//!
//! Two faces of DejaVu Sans Condensed are embedded, so that labels look alike everywhere and need
//! no font on the machine. They are subsets (Latin, Greek, Cyrillic, punctuation), made from
//! version 2.37:
//!
//! ```text
//! pyftsubset DejaVuSansCondensed.ttf --layout-features= --no-hinting --drop-tables+=kern,FFTM \
//!     --unicodes=U+20-7E,U+A0-17F,U+384-3CE,U+400-45F,U+2010-2026,U+20AC,\
//!     U+2190-2193,U+2212,U+221E,U+2260-2265,U+FFFD
//! ```

use ab_glyph::{Font as _, FontRef, GlyphId, PxScale, PxScaleFont, ScaleFont as _, point};
use sdxl_pipeline::picture::Picture;

const REGULAR: &[u8] = include_bytes!("font/DejaVuSansCondensed.ttf");
const BOLD: &[u8] = include_bytes!("font/DejaVuSansCondensed-Bold.ttf");

/// Stands for letters that the font lacks.
const UNKNOWN: char = '\u{fffd}';

/// Font size: pixels of an em.
const EM: f32 = 14.0;

/// Pixels from one line to the next.
pub(super) const LINE_HEIGHT: u32 = 18;

/// Pixels from the top of a line down to its baseline.
const BASELINE: u32 = 14;

/// Weight of the letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Face {
    Regular,
    Bold,
}

/// Both faces, at one size.
#[derive(Debug)]
pub(super) struct Font {
    regular: FontRef<'static>,
    bold: FontRef<'static>,
}

impl Font {
    /// Reads the embedded faces.
    pub(super) fn load() -> Self {
        let parse = |bytes| FontRef::try_from_slice(bytes).expect("the embedded fonts parse, as the tests show");
        Font { regular: parse(REGULAR), bold: parse(BOLD) }
    }

    /// Width of `text` in pixels, rounded up.
    pub(super) fn width(&self, face: Face, text: &str) -> u32 {
        let face = self.scaled(face);
        text.chars().map(|letter| face.h_advance(glyph(&face, letter))).sum::<f32>().ceil() as u32
    }

    /// Draws one line of text with its upper left corner at `left`, `top`. Parts outside `picture`
    /// are cut off.
    pub(super) fn draw(&self, picture: &mut Picture, face: Face, text: &str, left: u32, top: u32, colour: [u8; 3]) {
        let face = self.scaled(face);
        let mut pen = point(left as f32, (top + BASELINE) as f32);
        for letter in text.chars() {
            let id = glyph(&face, letter);
            // A space has no outline.
            if let Some(outline) = face.outline_glyph(id.with_scale_and_position(face.scale(), pen)) {
                let corner = outline.px_bounds().min;
                let (left, top) = (corner.x as i64, corner.y as i64);
                outline.draw(|x, y, ink| blend(picture, left + i64::from(x), top + i64::from(y), colour, ink));
            }
            pen.x += face.h_advance(id);
        }
    }

    /// Breaks `text` between words into lines of at most `width` pixels. Text beyond the last of
    /// `lines` lines is replaced by `…`.
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

    fn scaled(&self, face: Face) -> PxScaleFont<&FontRef<'static>> {
        let font = match face {
            Face::Regular => &self.regular,
            Face::Bold => &self.bold,
        };
        let em = font.units_per_em().expect("the embedded fonts have units per em, as the tests show");
        // `PxScale` is the height from ascent to descent, not the em.
        font.as_scaled(PxScale::from(EM * font.height_unscaled() / em))
    }
}

fn glyph(face: &PxScaleFont<&FontRef<'static>>, letter: char) -> GlyphId {
    match face.glyph_id(letter) {
        GlyphId(0) => face.glyph_id(UNKNOWN),
        id => id,
    }
}

/// Lays `colour` over a pixel with the opacity `ink`, 0 to 1. Pixels outside `picture` are left
/// out.
fn blend(picture: &mut Picture, x: i64, y: i64, colour: [u8; 3], ink: f32) {
    if !(0..i64::from(picture.width)).contains(&x) || !(0..i64::from(picture.height)).contains(&y) {
        return;
    }
    let at = 3 * (y as usize * picture.width as usize + x as usize);
    for (value, new) in picture.rgb[at..at + 3].iter_mut().zip(colour) {
        *value = (f32::from(*value) + ink * (f32::from(new) - f32::from(*value))).round() as u8;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn letters_leave_ink_where_they_should() {
        let font = Font::load();
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
        let font = Font::load();
        let mut picture = Picture { width: 20, height: 20, rgb: vec![255; 1200] };
        font.draw(&mut picture, Face::Regular, "猫", 0, 0, [0; 3]);
        assert!(picture.rgb.contains(&0));
        assert_ne!(font.width(Face::Regular, "i"), font.width(Face::Regular, "W"));
    }

    #[test]
    fn lines_break_between_words() {
        let font = Font::load();
        let lines = font.wrap(Face::Regular, "an emoji of a cat face with very many words", 90, 2);
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("an emoji") && lines[1].ends_with('…'), "{lines:?}");
        assert!(font.wrap(Face::Regular, "  ", 90, 2).is_empty());
    }

    proptest! {
        #[test]
        fn no_text_overflows_or_panics(text in any::<String>(), width in 16u32..200, left in 0u32..60, top in 0u32..60) {
            let font = Font::load();
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
