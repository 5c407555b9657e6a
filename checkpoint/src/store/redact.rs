//! A domain's definition without its secrets.

use roxmltree::{Document, ParsingOptions};

/// Attributes that hold a secret in libvirt's domain format.
const SECRET_ATTRIBUTES: [&str; 2] = ["passwd", "password"];
/// Elements that do: cookies of a disk that is fetched over HTTP, as libvirt, too, leaves out.
const SECRET_ELEMENTS: [&str; 3] = ["cookies", "passwd", "password"];

/// `definition` without the attributes and elements that hold secrets; empty when it cannot be read, for then
/// nobody knows what is in it.
pub(super) fn redacted(definition: &str) -> String {
    let options = ParsingOptions::default();
    let Ok(document) = Document::parse_with_options(definition, options) else {
        return String::new();
    };
    let attributes = document
        .descendants()
        .flat_map(|node| node.attributes())
        .filter(|attribute| SECRET_ATTRIBUTES.contains(&attribute.name()))
        .map(|attribute| attribute.range());
    let elements = document
        .descendants()
        .filter(|node| node.is_element() && SECRET_ELEMENTS.contains(&node.tag_name().name()))
        .map(|node| node.range());
    let mut secrets: Vec<_> = attributes.chain(elements).collect();
    secrets.sort_by_key(|range| range.start);
    let mut out = String::with_capacity(definition.len());
    let mut at = 0;
    for secret in secrets {
        // It lies within one that is out already.
        if secret.start < at {
            continue;
        }
        out.push_str(definition[at..secret.start].trim_end());
        at = secret.end;
    }
    out.push_str(&definition[at..]);
    out
}

#[cfg(test)]
mod tests {
    use super::redacted;

    #[test]
    fn passwords_leave_and_the_rest_stays() {
        let definition = "<domain><graphics type='vnc' passwd='a&lt;b' port='1'/></domain>";
        let clean = "<domain><graphics type='vnc' port='1'/></domain>";
        assert_eq!(redacted(definition), clean);
        assert_eq!(redacted(clean), clean);
        assert_eq!(redacted("<domain"), "");
        let cookies = "<domain><source a='1'><cookies><cookie name='x' passwd='y'>z</cookie></cookies>\
                       <host/></source></domain>";
        let without = "<domain><source a='1'><host/></source></domain>";
        assert_eq!(redacted(cookies), without);
    }
}
