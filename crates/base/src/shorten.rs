//! Quotations of input in messages.

/// Text from a file or the command line for a message: one line, and at most enough to recognize
/// the text.
#[must_use]
pub fn shorten(text: &str) -> String {
    const KEEP: usize = 60;
    let mut shown = String::new();
    for character in text.chars().take(KEEP) {
        match character {
            '"' | '\'' | '\\' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
    }
    if text.chars().nth(KEEP).is_some() {
        shown.push('…');
    }
    shown
}

/// Writes a path into JSON, which holds only text: other bytes become U+FFFD.
pub fn path_as_text<S: serde::Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// As [`shorten`], with both ends of a long text.
#[must_use]
pub fn both_ends(text: &str) -> String {
    const KEEP: usize = 30;
    match text.char_indices().rev().nth(KEEP - 1) {
        Some((end, _)) if text.chars().nth(2 * KEEP).is_some() => {
            let begin: String = text.chars().take(KEEP).collect();
            format!("{} … {}", shorten(&begin), shorten(&text[end..]))
        }
        _ => shorten(text),
    }
}

#[cfg(test)]
mod tests {
    use super::{both_ends, shorten};

    #[test]
    fn the_end_is_shown_too() {
        assert_eq!(both_ends(&"é".repeat(60)), "é".repeat(60));
        let long = format!("begin{}end", "é".repeat(100));
        assert_eq!(both_ends(&long), format!("begin{} … {}end", "é".repeat(25), "é".repeat(27)));
    }

    #[test]
    fn one_line_of_bounded_length() {
        assert_eq!(shorten(r#"C:\x "é" it's"#), r#"C:\x "é" it's"#);
        assert_eq!(shorten("a\nb\t\u{1b}[0m"), r"a\nb\t\u{1b}[0m");
        assert_eq!(shorten(&"é".repeat(60)), "é".repeat(60));
        assert_eq!(shorten(&"é".repeat(10 << 20)), format!("{}…", "é".repeat(60)));
    }
}
