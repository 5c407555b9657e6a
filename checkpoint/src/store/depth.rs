//! How deep elements nest, found out without building anything: whoever recurses over a document
//! must know before he has one.

/// The deepest nesting of elements in `xml`, which need not be well-formed.
///
/// Comments, character data, processing instructions and quoted values are passed over, for what
/// stands in them looks like tags and is none.
pub(super) fn depth(xml: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0_usize);
    let mut rest = xml;
    while let Some(start) = rest.find('<') {
        rest = &rest[start..];
        if let Some((_, end)) = PASSED_OVER
            .iter()
            .find(|(begin, _)| rest.starts_with(begin))
        {
            rest = rest.find(end).map_or("", |at| &rest[at + end.len()..]);
            continue;
        }
        let length = tag_length(rest);
        let (tag, after) = rest.split_at(length);
        rest = after;
        if tag.starts_with("</") {
            depth = depth.saturating_sub(1);
        } else {
            deepest = deepest.max(depth.saturating_add(1));
            depth = depth.saturating_add(usize::from(!tag.ends_with("/>")));
        }
    }
    deepest
}

const PASSED_OVER: [(&str, &str); 4] = [
    ("<!--", "-->"),
    ("<![CDATA[", "]]>"),
    ("<?", "?>"),
    ("<!", ">"),
];

/// Bytes of the tag at the start of `text`, up to the first `>` outside of quotes.
fn tag_length(text: &str) -> usize {
    let mut quote = None;
    for (at, byte) in text.bytes().enumerate() {
        match (quote, byte) {
            (None, b'>') => return at + 1,
            (None, b'"' | b'\'') => quote = Some(byte),
            (Some(open), _) if open == byte => quote = None,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::depth;

    #[test]
    fn only_elements_count_and_nothing_hides_them() {
        for (xml, expected) in [
            ("", 0),
            ("text", 0),
            ("<a/>", 1),
            ("<a><b/><c></c></a>", 2),
            ("<a x='/>'><b y=\"</a>\"><c/></b></a>", 3),
            (
                "<?xml version='1.0'?><!-- <a><a> --><a><![CDATA[</a>]]><b/></a>",
                2,
            ),
            ("<a><a><a", 3),
            ("</a></a><a>", 1),
        ] {
            assert_eq!(depth(xml), expected, "{xml}");
        }
        let hidden = "<a b='/>'>".repeat(1000);
        assert_eq!(depth(&hidden), 1000);
    }
}
