//! Providers of AI models: whose a model is, and what a gateway's base URL may look like.

/// What a key can be for: the providers with an API of their own, then the two that pass calls on to any of them.
pub const SERVICES: [&str; 5] = ["openai", "anthropic", "xai", OPENROUTER, GATEWAY];
pub const OPENROUTER: &str = "openrouter";
pub const GATEWAY: &str = "gateway";

const MAX_MODEL_LENGTH: usize = 200;
const MAX_BASE_URL_LENGTH: usize = 2000;

/// How OpenAI's models are called, besides o1, o3, o4 and so on. A fine-tuned model is "ft:" and the model it was.
const OPENAI_PREFIXES: [&str; 11] = [
    "gpt-",
    "chatgpt-",
    "ft:",
    "text-embedding-",
    "dall-e",
    "whisper-",
    "tts-",
    "sora-",
    "codex-",
    "omni-moderation-",
    "text-moderation-",
];

/// A model and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model<'a> {
    /// One of [`SERVICES`] but the gateway.
    pub provider: &'static str,
    /// What the provider itself calls it.
    name: &'a str,
}

impl<'a> Model<'a> {
    /// Reads a model's name, with the provider in front or known by its beginning.
    pub fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim();
        if text.len() > MAX_MODEL_LENGTH || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return None;
        }
        if let Some((prefix, rest)) = text.split_once('/') {
            if prefix.is_empty() || rest.is_empty() {
                return None;
            }
            let own = SERVICES[..3].iter().find(|provider| prefix.eq_ignore_ascii_case(provider));
            return Some(
                own.map_or(Self { provider: OPENROUTER, name: text }, |provider| Self { provider, name: rest }),
            );
        }
        let lower = text.to_ascii_lowercase();
        let provider = match lower.as_bytes() {
            _ if OPENAI_PREFIXES.iter().any(|prefix| lower.starts_with(prefix)) => "openai",
            [b'o', digit, ..] if digit.is_ascii_digit() => "openai",
            _ if lower.starts_with("claude") => "anthropic",
            _ if lower.starts_with("grok") => "xai",
            _ => return None,
        };
        Some(Self { provider, name: text })
    }

    /// What a service calls it: those that pass calls on want to know whose it is.
    pub fn name_at(&self, service: &str) -> String {
        match (self.provider, service) {
            (OPENROUTER, _) => self.name.to_owned(),
            ("xai", OPENROUTER) => format!("x-ai/{}", self.name),
            (provider, OPENROUTER | GATEWAY) => format!("{provider}/{}", self.name),
            _ => self.name.to_owned(),
        }
    }
}

/// The service of that name, in whatever case and with blanks around it.
pub fn service(text: &str) -> Option<&'static str> {
    SERVICES.into_iter().find(|service| text.trim().eq_ignore_ascii_case(service))
}

/// What keeps a text from being a base URL, as far as its characters tell. Nothing of it is quoted.
pub fn base_url_problem(url: &str) -> Option<String> {
    if url.is_empty() {
        return Some("it is empty".into());
    }
    if url.len() > MAX_BASE_URL_LENGTH {
        return Some(format!("it has {} bytes, and at most {MAX_BASE_URL_LENGTH} are allowed", url.len()));
    }
    // A backslash is a slash to browsers and none to others, so that they would not agree on the host.
    if !url.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\') {
        return Some("it has characters that are not allowed in a URL".into());
    }
    let rest = ["http://", "https://"]
        .iter()
        .find_map(|scheme| url.get(..scheme.len())?.eq_ignore_ascii_case(scheme).then(|| &url[scheme.len()..]));
    let Some(rest) = rest else {
        return Some("it must begin with http:// or https://".into());
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return Some("it must not hold a user name or password".into());
    }
    if authority.is_empty() {
        return Some("it has no host".into());
    }
    if rest.contains(['?', '#']) {
        return Some("it must not have a query or a fragment".into());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_known_by_its_beginning() {
        for (model, provider) in [
            ("gpt-4o-mini", "openai"),
            ("GPT-5", "openai"),
            (" gpt-4.1 ", "openai"),
            ("chatgpt-4o-latest", "openai"),
            ("o1", "openai"),
            ("o3-mini", "openai"),
            ("o4-mini-2025-04-16", "openai"),
            ("text-embedding-3-small", "openai"),
            ("dall-e-3", "openai"),
            ("whisper-1", "openai"),
            ("ft:gpt-4o-mini:acme::id", "openai"),
            ("claude-sonnet-4-5", "anthropic"),
            ("Claude-3-opus", "anthropic"),
            ("grok-4", "xai"),
        ] {
            let found = Model::parse(model).map(|model| (model.provider, model.name));
            assert_eq!(found, Some((provider, model.trim())), "{model}");
        }
    }

    #[test]
    fn a_model_may_have_its_provider_in_front() {
        for (model, provider, name) in [
            ("openai/gpt-4o", "openai", "gpt-4o"),
            ("OpenAI/whatever", "openai", "whatever"),
            ("anthropic/claude-3", "anthropic", "claude-3"),
            ("xai/grok-4", "xai", "grok-4"),
            ("xai/a/b", "xai", "a/b"),
            ("x-ai/grok-4", "openrouter", "x-ai/grok-4"),
            ("meta-llama/llama-4", "openrouter", "meta-llama/llama-4"),
            ("openrouter/auto", "openrouter", "openrouter/auto"),
            ("gateway/x", "openrouter", "gateway/x"),
            ("google/gpt-4", "openrouter", "google/gpt-4"),
        ] {
            assert_eq!(Model::parse(model), Some(Model { provider, name }), "{model}");
        }
    }

    #[test]
    fn what_is_no_known_model_is_nobodys() {
        let long = format!("gpt-{}", "4".repeat(197));
        for model in [
            "", "  ", "/", "openai/", "/gpt-4", "gpt", "o", "of-mine", "llama-4", "gpt-4 o", "gpt-4\n5", "gpt-ü", &long,
        ] {
            assert_eq!(Model::parse(model), None, "{model:?}");
        }
        assert!(Model::parse(&long[..200]).is_some());
    }

    #[test]
    fn each_service_gets_the_name_it_knows() {
        for (model, service, name) in [
            ("openai/gpt-4o", "openai", "gpt-4o"),
            ("gpt-4o", "openai", "gpt-4o"),
            ("gpt-4o", "gateway", "openai/gpt-4o"),
            ("openai/gpt-4o", "openrouter", "openai/gpt-4o"),
            ("grok-4", "gateway", "xai/grok-4"),
            ("xai/grok-4", "openrouter", "x-ai/grok-4"),
            ("grok-4", "xai", "grok-4"),
            ("meta-llama/llama-4", "gateway", "meta-llama/llama-4"),
            ("meta-llama/llama-4", "openrouter", "meta-llama/llama-4"),
        ] {
            assert_eq!(
                Model::parse(model).map(|model| model.name_at(service)).as_deref(),
                Some(name),
                "{model} {service}"
            );
        }
    }

    #[test]
    fn a_service_is_named_in_any_case() {
        for service_name in SERVICES {
            assert_eq!(service(&format!("\t {} \n", service_name.to_uppercase())), Some(service_name));
        }
        for other in ["", " ", "open ai", "openai,xai", "mistral", "sk-secret"] {
            assert_eq!(service(other), None, "{other}");
        }
    }

    #[test]
    fn a_base_url_is_one_that_a_path_can_be_put_behind() {
        for good in
            ["https://gw.example/v1", "http://gw", "HTTPS://gw:8443/", "http://[::1]:80/v1", "https://gw/%40@:x"]
        {
            assert_eq!(base_url_problem(good), None, "{good}");
        }
        for (bad, problem) in [
            ("", "it is empty"),
            ("gw.example/v1", "it must begin with http:// or https://"),
            ("ftp://gw", "it must begin with http:// or https://"),
            ("https:/gw", "it must begin with http:// or https://"),
            ("javascript:alert(1)", "it must begin with http:// or https://"),
            ("https://", "it has no host"),
            ("https:///gw", "it has no host"),
            ("https://u:p@gw/", "it must not hold a user name or password"),
            ("https://@gw/", "it must not hold a user name or password"),
            ("https://u@", "it must not hold a user name or password"),
            ("https://gw\\@evil/", "it has characters that are not allowed in a URL"),
            ("https://gw/\r\nX: 1", "it has characters that are not allowed in a URL"),
            ("https://gw/ü", "it has characters that are not allowed in a URL"),
            ("https://gw/?key=1", "it must not have a query or a fragment"),
            ("https://gw#x", "it must not have a query or a fragment"),
        ] {
            assert_eq!(base_url_problem(bad).as_deref(), Some(problem), "{bad}");
        }
        let long = format!("https://{}", "x".repeat(1993));
        assert!(base_url_problem(&long).is_some_and(|problem| problem.contains("2001 bytes")));
        assert_eq!(base_url_problem(&long[..2000]), None);
    }
}
