//! Small pieces of XHTML. Everything that comes from outside goes through [`escape`].

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::error::Result;
use crate::picture::Picture;

/// Pictures with a longer side are stored smaller in the report.
const MOST_SIDE: u32 = 384;

/// Text as it can stand between tags and in attributes. Characters that XML does not allow become U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' | '\t' => safe.push(letter),
            '\u{fffe}' | '\u{ffff}' => safe.push('\u{fffd}'),
            letter if letter.is_control() => safe.push('\u{fffd}'),
            letter => safe.push(letter),
        }
    }
    safe
}

/// Text that people wrote, kept from turning the writing direction of what is around it.
pub(super) fn said(text: &str) -> String {
    format!("<bdi>{}</bdi>", escape(text))
}

/// A picture inside the page.
///
/// # Errors
/// If it is not as large as it says.
pub(super) fn image(picture: &Picture, about: &str) -> Result<String> {
    let shown = super::sheet::fit(picture, 1, MOST_SIDE)?;
    let data = STANDARD.encode(shown.to_png_bytes()?);
    let (width, height, about) = (shown.width, shown.height, escape(about));
    Ok(format!(
        "<img src=\"data:image/png;base64,{data}\" width=\"{width}\" height=\"{height}\" alt=\"{about}\" title=\"{about}\"/>"
    ))
}

/// A bulleted list; nothing if there is nothing in it.
pub(super) fn list(class: &str, items: &[String]) -> String {
    if items.is_empty() {
        return String::new();
    }
    let items: String = items.iter().map(|item| format!("<li>{}</li>", said(item))).collect();
    format!("<ul class=\"{class}\">{items}</ul>\n")
}

/// A list of names and values; the values are markup.
pub(super) fn facts(facts: &[(&str, String)]) -> String {
    let each = |(name, value): &(&str, String)| format!("<div><dt>{}</dt><dd>{value}</dd></div>", escape(name));
    format!("<dl class=\"facts\">{}</dl>\n", facts.iter().map(each).collect::<String>())
}

/// A plot, or several, under a title and a sentence that says how to read them.
pub(super) fn figure(title: &str, caption: &str, body: &str) -> String {
    format!("<figure>\n<h3>{}</h3>\n<figcaption>{}</figcaption>\n{body}</figure>\n", escape(title), escape(caption))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_survives_as_text(text in any::<String>()) {
            let markup = format!("<p title=\"{0}\">{0}</p>", escape(&text));
            let parsed = roxmltree::Document::parse(&markup).unwrap();
            let expected = text.replace(|c: char| c.is_control() && c != '\n' && c != '\t', "\u{fffd}");
            let expected = expected.replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}");
            prop_assert_eq!(parsed.root_element().text().unwrap_or_default(), expected);
        }
    }
}
