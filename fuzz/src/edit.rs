//! Changes one place inside of a protobuf message and corrects all lengths around it.

use crate::choices::Choices;

/// A field of a message.
#[derive(Debug, Clone)]
enum Field {
    Number(u64, u64),
    Eight(u64, [u8; 8]),
    Four(u64, [u8; 4]),
    /// A text, some bytes, or an embedded message. Each of them is stored with its length.
    Bytes(u64, Vec<u8>),
}

/// Changes `message` once. The choices decide on the place and the kind of the change.
pub fn edit(message: &[u8], choices: &mut Choices) -> Vec<u8> {
    let Some(mut fields) = parse(message) else { return bytes(message, choices) };
    if fields.is_empty() {
        return bytes(message, choices);
    }
    let at = usize::from(choices.short()) % fields.len();
    // Most changes go to a deeper level, because the outer levels have few fields.
    if let Field::Bytes(_, content) = &mut fields[at]
        && !choices.rarely(6)
    {
        *content = edit(content, choices);
        return write(&fields);
    }
    match choices.below(6) {
        0 => drop(fields.remove(at)),
        1 => {
            let copy = fields[at].clone();
            fields.insert(at, copy);
        }
        2 => {
            let other = usize::from(choices.short()) % fields.len();
            fields.swap(at, other);
        }
        3 => match &mut fields[at] {
            Field::Number(tag, _) | Field::Eight(tag, _) | Field::Four(tag, _) | Field::Bytes(tag, _) => {
                *tag = 1 + choices.number() % 600
            }
        },
        4 => {
            // The field is wrapped in up to 255 messages, which is deeper than readers accept.
            if let Field::Bytes(tag, content) = &mut fields[at] {
                let tag = *tag;
                for _ in 0..choices.byte() {
                    *content = write(&[Field::Bytes(tag, std::mem::take(content))]);
                }
            }
        }
        _ => match &mut fields[at] {
            Field::Number(_, value) => *value = choices.number(),
            Field::Eight(_, value) => *value = choices.number().to_le_bytes(),
            Field::Four(_, value) => *value = (choices.number() as u32).to_le_bytes(),
            Field::Bytes(_, content) => *content = bytes(content, choices),
        },
    }
    write(&fields)
}

/// Flips a bit, changes the length, or replaces all bytes.
fn bytes(content: &[u8], choices: &mut Choices) -> Vec<u8> {
    let mut content = content.to_vec();
    match choices.below(4) {
        0 if !content.is_empty() => {
            let at = usize::from(choices.short()) % content.len();
            content[at] ^= 1 << choices.below(8);
        }
        1 => content.truncate(choices.below(64)),
        2 => content.extend(choices.bytes(3)),
        _ => {
            let length = choices.below(16);
            content = choices.bytes(length);
        }
    }
    content
}

fn parse(mut message: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let tag = key >> 3;
        if tag == 0 {
            return None;
        }
        fields.push(match key & 7 {
            0 => Field::Number(tag, varint(&mut message)?),
            1 => Field::Eight(tag, take(&mut message, 8)?.try_into().ok()?),
            5 => Field::Four(tag, take(&mut message, 4)?.try_into().ok()?),
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                Field::Bytes(tag, take(&mut message, length)?.to_vec())
            }
            _ => return None,
        });
    }
    Some(fields)
}

fn take<'a>(message: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = message.split_at_checked(count)?;
    *message = rest;
    Some(taken)
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(message, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn write(fields: &[Field]) -> Vec<u8> {
    let mut message = Vec::new();
    for field in fields {
        let key = |tag: u64, kind: u64| tag << 3 | kind;
        match field {
            Field::Number(tag, value) => {
                push(&mut message, key(*tag, 0));
                push(&mut message, *value);
            }
            Field::Eight(tag, value) => {
                push(&mut message, key(*tag, 1));
                message.extend(value);
            }
            Field::Four(tag, value) => {
                push(&mut message, key(*tag, 5));
                message.extend(value);
            }
            Field::Bytes(tag, content) => {
                push(&mut message, key(*tag, 2));
                push(&mut message, content.len() as u64);
                message.extend(content);
            }
        }
    }
    message
}

fn push(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}
