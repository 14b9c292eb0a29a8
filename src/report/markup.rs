//! Small pieces of HTML. Text from outside goes through [`visible`]; maud escapes it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use maud::{Markup, html};
use sdxl_pipeline::picture::Picture;
use squeeze_base::error::Result;

/// Longest side of a picture in the page, in pixels; larger pictures are embedded smaller.
const MOST_SIDE: u32 = 384;

/// `text` with U+FFFD in place of the characters that neither HTML nor XML allows.
pub(super) fn visible(text: &str) -> String {
    let forbidden = |letter: char| match letter {
        '\n' | '\t' => false,
        letter => letter.is_control() || matches!(letter, '\u{fffe}' | '\u{ffff}'),
    };
    text.replace(forbidden, "\u{fffd}")
}

/// Text that a person wrote, isolated so that it cannot turn the writing direction of the text
/// around it.
pub(super) fn isolated(text: &str) -> Markup {
    html! { bdi { (visible(text)) } }
}

/// A picture inside the page; `about` is its description.
///
/// # Errors
/// [`Error::Argument`](squeeze_base::Error::Argument) if the picture's bytes do not match its size.
pub(super) fn image(picture: &Picture, about: &str) -> Result<Markup> {
    let shown = super::sheet::fit(picture, 1, MOST_SIDE)?;
    let source = format!("data:image/png;base64,{}", STANDARD.encode(shown.to_png_bytes()?));
    let about = visible(about);
    Ok(html! { img src=(source) width=(shown.width) height=(shown.height) alt=(about) title=(about); })
}

/// A bulleted list, or nothing if there are no items.
pub(super) fn list(class: &str, items: &[String]) -> Markup {
    html! {
        @if !items.is_empty() {
            ul class=(class) {
                @for item in items { li { (isolated(item)) } }
            }
        }
    }
}

/// A list of names and values.
pub(super) fn facts(facts: &[(&str, Markup)]) -> Markup {
    html! {
        dl.facts {
            @for (name, value) in facts {
                div { dt { (name) } dd { (value) } }
            }
        }
    }
}

/// One or more plots under a title and a sentence that explains how to read them.
pub(super) fn figure(title: &str, caption: &str, body: &Markup) -> Markup {
    html! {
        figure {
            h3 { (title) }
            figcaption { (caption) }
            (body)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_survives_as_text(text in any::<String>()) {
            let markup = html! { p title=(visible(&text)) { (visible(&text)) } }.into_string();
            let parsed = roxmltree::Document::parse(&markup).unwrap();
            let expected = text.replace(|c: char| c.is_control() && c != '\n' && c != '\t', "\u{fffd}");
            let expected = expected.replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}");
            prop_assert_eq!(parsed.root_element().text().unwrap_or_default(), expected);
        }
    }
}
