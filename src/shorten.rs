//! Input as messages show it.

/// Text from a file or the command line as it is shown in a message: in one line, and no more of it than says which text it is.
pub(crate) fn shorten(text: &str) -> String {
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

#[cfg(test)]
mod tests {
    use super::shorten;

    #[test]
    fn one_line_of_bounded_length() {
        assert_eq!(shorten(r#"C:\x "é" it's"#), r#"C:\x "é" it's"#);
        assert_eq!(shorten("a\nb\t\u{1b}[0m"), r"a\nb\t\u{1b}[0m");
        assert_eq!(shorten(&"é".repeat(60)), "é".repeat(60));
        assert_eq!(shorten(&"é".repeat(10 << 20)), format!("{}…", "é".repeat(60)));
    }
}
