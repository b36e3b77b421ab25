//! All that a server offers: its tools, resources, templates of resources and prompts, page after page.

use super::Line;
use super::tag::CallTag;
use crate::net::body::Held;
use crate::net::failure::Failure;
use crate::net::outcome::{Ending, Verdict};
use rmcp::model::{
    ClientRequest, ErrorCode, ListPromptsRequest, ListResourceTemplatesRequest, ListResourcesRequest, ListToolsRequest,
    PaginatedRequestParams,
};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use uuid::Uuid;

/// Entries of a list: what it takes to write them keeps other jobs waiting.
const MAX_ENTRIES: usize = 2_000;
/// Bytes of all lists together, where an answer may have more.
const MAX_BYTES: usize = 4 * 1024 * 1024;
/// Pages of a list. Some may be empty.
const MAX_PAGES: usize = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum List {
    Tools,
    Resources,
    ResourceTemplates,
    Prompts,
}

impl List {
    const ALL: [Self; 4] = [Self::Tools, Self::Resources, Self::ResourceTemplates, Self::Prompts];

    /// The member of a page that holds the entries, and of the catalogue.
    fn key(self) -> &'static str {
        match self {
            Self::Tools => "tools",
            Self::Resources => "resources",
            Self::ResourceTemplates => "resourceTemplates",
            Self::Prompts => "prompts",
        }
    }

    /// In words.
    fn name(self) -> &'static str {
        match self {
            Self::ResourceTemplates => "resource templates",
            other => other.key(),
        }
    }

    fn request(self, job: Uuid, cursor: Option<String>, held: &Held) -> (ClientRequest, CallTag) {
        let tag = CallTag::one_of_many(job, held.clone());
        let params = PaginatedRequestParams::default().with_cursor(cursor);
        macro_rules! request {
            ($request:ident) => {{
                let mut request = $request::with_param(params);
                request.extensions.insert(tag.clone());
                ClientRequest::$request(request)
            }};
        }
        let request = match self {
            Self::Tools => request!(ListToolsRequest),
            Self::Resources => request!(ListResourcesRequest),
            Self::ResourceTemplates => request!(ListResourceTemplatesRequest),
            Self::Prompts => request!(ListPromptsRequest),
        };
        (request, tag)
    }
}

/// Lists everything. The result is an object with an array for each list, its entries as the server sent them.
pub async fn fetch(line: &mut Line<'_>, job: Uuid, max_bytes: usize) -> Result<Option<Ending>, Failure> {
    let has = line.session.capabilities();
    let held = Held::default();
    let mut catalogue = Catalogue::new(max_bytes.min(MAX_BYTES));
    for list in List::ALL {
        let is_there = match list {
            List::Tools => has.tools.is_some(),
            List::Resources | List::ResourceTemplates => has.resources.is_some(),
            List::Prompts => has.prompts.is_some(),
        };
        catalogue.begin(list);
        if is_there && fetch_list(line, job, list, &held, &mut catalogue).await?.is_none() {
            return Ok(None);
        }
        catalogue.end();
    }
    let mut ending = Ending::answered(Verdict::Completed { result: catalogue.text });
    ending.held = held;
    Ok(Some(ending))
}

/// Adds all pages of a list. `None`: it was broken off.
async fn fetch_list(
    line: &mut Line<'_>,
    job: Uuid,
    list: List,
    held: &Held,
    catalogue: &mut Catalogue,
) -> Result<Option<()>, Failure> {
    let mut cursor = None;
    for page_number in 1..=MAX_PAGES {
        let (request, tag) = list.request(job, cursor.clone(), held);
        let page = match line.ask(request, tag).await {
            Ok(Some(page)) => page,
            Ok(None) => return Ok(None),
            // Templates go with resources, but many a server has no method for them.
            Err(Failure::Rpc { code, .. }) if code == ErrorCode::METHOD_NOT_FOUND.0 && page_number == 1 => {
                return Ok(Some(()));
            }
            Err(failure) => return Err(failure),
        };
        let next = catalogue.add(&page)?;
        if next.is_none() {
            return Ok(Some(()));
        }
        if next == cursor {
            break;
        }
        cursor = next;
    }
    Err(Failure::NotMcp(format!("its list of {} does not end", list.name())))
}

/// A catalogue, being written.
struct Catalogue {
    text: String,
    max_bytes: usize,
    list: List,
    /// Of this list.
    entries: usize,
}

impl Catalogue {
    fn new(max_bytes: usize) -> Self {
        Self { text: String::new(), max_bytes, list: List::Tools, entries: 0 }
    }

    fn begin(&mut self, list: List) {
        self.text.push(if self.text.is_empty() { '{' } else { ',' });
        self.text.push_str(&format!("\"{}\":[", list.key()));
        (self.list, self.entries) = (list, 0);
    }

    /// Adds the entries of a page, and returns the cursor of the next one.
    fn add(&mut self, page: &str) -> Result<Option<String>, Failure> {
        let name = self.list.name();
        let misfit = || Failure::NotMcp(format!("its list of {name} is not an object of the expected form"));
        let members: BTreeMap<String, &RawValue> = serde_json::from_str(page).map_err(|_| misfit())?;
        let text = |key: &str| {
            let text = members.get(key).map(|value| serde_json::from_str::<Option<String>>(value.get()));
            text.transpose().map(Option::flatten).map_err(|_| misfit())
        };
        if text("resultType")?.is_some_and(|kind| kind != "complete") {
            return Err(misfit());
        }
        let entries: Vec<&RawValue> = match members.get(self.list.key()) {
            Some(entries) => serde_json::from_str(entries.get()).map_err(|_| misfit())?,
            None => return Err(misfit()),
        };
        for entry in entries {
            if self.entries == MAX_ENTRIES {
                return Err(Failure::NotMcp(format!("it lists more than {MAX_ENTRIES} {name}")));
            }
            if self.text.len() + entry.get().len() > self.max_bytes {
                return Err(Failure::NotMcp(format!("what it lists is larger than {} bytes", self.max_bytes)));
            }
            if self.entries > 0 {
                self.text.push(',');
            }
            // One that cannot be stored shall not cost all others: it is left out, and counted.
            let is_storable = serde_json::from_str::<serde_json::Value>(entry.get()).is_ok();
            self.text.push_str(if is_storable { entry.get() } else { "null" });
            self.entries += 1;
        }
        // Some servers say that there is no more with an empty cursor.
        Ok(text("nextCursor")?.filter(|cursor| !cursor.is_empty()))
    }

    fn end(&mut self) {
        self.text.push_str(if self.list == List::Prompts { "]}" } else { "]" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn all(pages: &[(List, &[&str])]) -> Result<Value, Failure> {
        let mut catalogue = Catalogue::new(1_000);
        for list in List::ALL {
            catalogue.begin(list);
            for (_, pages) in pages.iter().filter(|(of, _)| *of == list) {
                for page in *pages {
                    catalogue.add(page)?;
                }
            }
            catalogue.end();
        }
        Ok(serde_json::from_str(&catalogue.text).unwrap_or_else(|problem| panic!("{problem}: {}", catalogue.text)))
    }

    #[test]
    fn the_pages_of_all_lists_are_one_object() {
        let tools: &[&str] =
            &[r#"{"tools":[{"name":"a"},{"name":"b"}],"nextCursor":"x"}"#, r#"{"tools":[{"name":"c"}]}"#];
        let found = all(&[(List::Tools, tools), (List::Prompts, &[r#"{"prompts":[{"name":"p"}]}"#])]);
        let tools = json!([{"name": "a"}, {"name": "b"}, {"name": "c"}]);
        let expected = json!({"tools": tools, "resources": [], "resourceTemplates": [], "prompts": [{"name": "p"}]});
        assert_eq!(found, Ok(expected));
    }

    #[test]
    fn entries_come_through_to_the_letter() {
        let mut catalogue = Catalogue::new(1_000);
        catalogue.begin(List::Tools);
        let entry = r#"{"name": "a", "x": 1.10, "y": 12345678901234567890123}"#;
        let next = catalogue.add(&format!(r#"{{"tools": [{entry}], "nextCursor": "more"}}"#));
        assert_eq!(next, Ok(Some("more".to_owned())));
        assert!(catalogue.text.contains(entry), "{}", catalogue.text);
    }

    #[test]
    fn an_entry_that_cannot_be_stored_is_left_out() {
        let found = all(&[(List::Tools, &[r#"{"tools":[{"name":"a"},{"name":"\ud800"},{"name":"b"}]}"#])]);
        assert_eq!(found.map(|found| found["tools"].clone()), Ok(json!([{"name": "a"}, null, {"name": "b"}])));
    }

    #[test]
    fn an_empty_cursor_and_a_missing_one_end_a_list() {
        let mut catalogue = Catalogue::new(1_000);
        for page in [r#"{"tools":[]}"#, r#"{"tools":[],"nextCursor":null}"#, r#"{"tools":[],"nextCursor":""}"#] {
            assert_eq!(catalogue.add(page), Ok(None));
        }
    }

    #[test]
    fn what_is_no_page_or_too_much_is_refused() {
        for page in [
            "[]",
            "1",
            r#"{"resources":[]}"#,
            r#"{"tools":{}}"#,
            r#"{"tools":[],"nextCursor":7}"#,
            r#"{"tools":[],"resultType":"input_required"}"#,
        ] {
            assert!(all(&[(List::Tools, &[page])]).is_err(), "{page}");
        }
        let large = format!(r#"{{"tools":["{}"]}}"#, "x".repeat(1_000));
        assert!(
            all(&[(List::Tools, &[&large])])
                .is_err_and(|failure| failure.to_string().ends_with("larger than 1000 bytes"))
        );
        let mut catalogue = Catalogue::new(usize::MAX);
        let many = format!(r#"{{"tools":[{}1]}}"#, "1,".repeat(MAX_ENTRIES));
        let failure = catalogue.add(&many).err().map(|failure| failure.to_string()).unwrap_or_default();
        assert!(failure.ends_with("it lists more than 2000 tools"), "{failure}");
    }
}
