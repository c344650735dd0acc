//! gpt-oss: messages with a head that says for whom they are.
//!
//! `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>`.
//! The recipient may also stand before the channel.

use super::body::{self, Call, Tools, Unread};
use super::format::{Action, Mark, Place};

/// Ends a head.
pub(super) const MESSAGE: &str = "<|message|>";

/// The end of a message in any channel.
pub(super) const END: &str = "<|end|>";

/// A call; its body begins with the head.
pub(super) const CALL: Mark = Mark {
    open: "",
    close: Some("<|call|>"),
    action: Action::Call(read),
    place: Place::Anywhere,
    kept: true,
    of_calls: true,
};

pub(super) const MARKS: &[Mark] = &[
    head("<|start|>", Place::Anywhere),
    head("<|channel|>", Place::Anywhere),
    // The prompt ends with `<|start|>assistant`.
    head("to=", Place::First),
    end(END),
    end("<|return|>"),
    end("<|call|>"),
];

const fn head(open: &'static str, place: Place) -> Mark {
    Mark {
        open,
        close: Some(MESSAGE),
        action: Action::Head,
        place,
        kept: true,
        of_calls: false,
    }
}

const fn end(open: &'static str) -> Mark {
    Mark {
        open,
        close: None,
        action: Action::Drop,
        place: Place::Anywhere,
        kept: false,
        of_calls: false,
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Reasoning,
    Call,
}

/// What the message under a head is. The last channel counts; `assistant` as a recipient is none.
pub(super) fn kind(head: &str) -> Kind {
    let channel = head.rsplit_once("<|channel|>").map_or("", |(_, channel)| channel);
    match recipient(head) {
        Some("assistant") | None if channel.starts_with("analysis") => Kind::Reasoning,
        Some("assistant") | None => Kind::Text,
        Some(_) => Kind::Call,
    }
}

fn recipient(head: &str) -> Option<&str> {
    let (_, after) = head.split_once("to=")?;
    after.split([' ', '<']).next().filter(|name| !name.is_empty())
}

fn read(body: &str, _tools: Tools<'_>) -> Result<Vec<Call>, Unread> {
    let (head, arguments) = body.split_once(MESSAGE).ok_or(Unread::Bad)?;
    // The tools that the model may bring along, such as `python`, are not on offer.
    let name = recipient(head).and_then(|name| name.strip_prefix("functions."));
    let name = name.ok_or(Unread::Bad)?;
    Ok(vec![Call::new(name, body::object(arguments)?)])
}
