//! The MCP side: tools, a resource and a prompt.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use rmcp::model::*;
use rmcp::service::RequestContext;
use rmcp::{ErrorData, RoleServer, ServerHandler};
use serde_json::{Value, json};

const WELCOME: &str = "note://welcome";

type Context = RequestContext<RoleServer>;
type Page = Option<PaginatedRequestParams>;
type Answer<T> = Result<T, ErrorData>;

/// What the server offers: tools, a resource and a prompt.
pub struct Offer {
    /// No protocol version without sessions.
    pub legacy: bool,
}

impl ServerHandler for Offer {
    fn get_info(&self) -> ServerConfig {
        let mut info = ServerConfig::new(ServerCapabilities::default());
        info.capabilities.tools = Some(ToolsCapability::default());
        info.capabilities.resources = Some(ResourcesCapability::default());
        info.capabilities.prompts = Some(PromptsCapability::default());
        info.with_server_info(Implementation::new("example", env!("CARGO_PKG_VERSION")))
    }

    fn supported_protocol_versions(&self) -> Cow<'static, [ProtocolVersion]> {
        if self.legacy {
            Cow::Borrowed(ProtocolVersion::known_up_to(&ProtocolVersion::V_2025_11_25))
        } else {
            Cow::Borrowed(ProtocolVersion::KNOWN_VERSIONS)
        }
    }

    async fn list_tools(&self, _: Page, _: Context) -> Answer<ListToolsResult> {
        let (int, text) = (json!({"type": "integer"}), json!({"type": "string"}));
        let input = |properties: Value, required: &[&str]| json!({"type": "object", "properties": properties, "required": required});
        let tools = json!([
            {"name": "add", "description": "Add two whole numbers",
             "inputSchema": input(json!({"a": int, "b": int}), &["a", "b"]),
             "outputSchema": input(json!({"sum": int}), &["sum"])},
            {"name": "echo", "description": "Say the text again",
             "inputSchema": input(json!({"text": text}), &["text"])},
            {"name": "slow", "description": "Take ms milliseconds, in steps",
             "inputSchema": input(json!({"ms": int, "steps": int}), &["ms"])},
            {"name": "fail", "description": "Fail with this message",
             "inputSchema": input(json!({"message": text}), &["message"])},
        ]);
        let tools = serde_json::from_value(tools).map_err(internal)?;
        Ok(ListToolsResult::with_all_items(tools))
    }

    async fn call_tool(&self, call: CallToolRequestParams, context: Context) -> Answer<CallToolResponse> {
        let args = call.arguments.unwrap_or_default();
        let result = match call.name.as_ref() {
            "add" => add(int(&args, "a")?, int(&args, "b")?),
            "echo" => said(text(&args, "text")?),
            "slow" => slow(&args, &context).await?,
            "fail" => failure(text(&args, "message")?),
            other => return Err(invalid(format!("unknown tool: {other}"))),
        };
        Ok(result.into())
    }

    async fn list_resources(&self, _: Page, _: Context) -> Answer<ListResourcesResult> {
        let welcome = Resource::new(WELCOME, "welcome").with_mime_type("text/plain");
        Ok(ListResourcesResult::with_all_items(vec![welcome]))
    }

    async fn read_resource(&self, request: ReadResourceRequestParams, _: Context) -> Answer<ReadResourceResponse> {
        if request.uri != WELCOME {
            let message = format!("unknown resource: {}", request.uri);
            return Err(ErrorData::resource_not_found(message, None));
        }
        let note = ResourceContents::text("Welcome to the hub.", WELCOME);
        Ok(ReadResourceResult::new(vec![note.with_mime_type("text/plain")]).into())
    }

    async fn list_prompts(&self, _: Page, _: Context) -> Answer<ListPromptsResult> {
        let name = PromptArgument::new("name").with_required(true);
        let greet = Prompt::new("greet", Some("Greet somebody"), Some(vec![name]));
        Ok(ListPromptsResult::with_all_items(vec![greet]))
    }

    async fn get_prompt(&self, request: GetPromptRequestParams, _: Context) -> Answer<GetPromptResponse> {
        if request.name != "greet" {
            return Err(invalid(format!("unknown prompt: {}", request.name)));
        }
        let args = request.arguments.unwrap_or_default();
        let words = format!("Please say hello to {}.", text(&args, "name")?);
        Ok(GetPromptResult::new(vec![PromptMessage::new_text(Role::User, words)]).into())
    }
}

fn add(a: i64, b: i64) -> CallToolResult {
    let Some(sum) = a.checked_add(b) else {
        return failure("the sum does not fit into 64 bits");
    };
    let mut result = said(format!("{a} + {b} = {sum}"));
    result.structured_content = Some(json!({"sum": sum}));
    result
}

/// How many calls of `slow` are asleep, and were at most.
pub static ASLEEP: AtomicU64 = AtomicU64::new(0);
pub static MOST_ASLEEP: AtomicU64 = AtomicU64::new(0);

struct Asleep;

impl Asleep {
    fn new() -> Self {
        MOST_ASLEEP.fetch_max(ASLEEP.fetch_add(1, SeqCst) + 1, SeqCst);
        Self
    }
}

impl Drop for Asleep {
    fn drop(&mut self) {
        ASLEEP.fetch_sub(1, SeqCst);
    }
}

/// Sleeps in steps and reports each to a client that asked for progress.
async fn slow(args: &JsonObject, context: &Context) -> Answer<CallToolResult> {
    let ms = u32::try_from(int(args, "ms")?).map_err(|_| invalid("ms is out of range"))?;
    let steps = if args.contains_key("steps") { int(args, "steps")? } else { 1 };
    let steps = u32::try_from(steps).map_err(|_| invalid("steps is out of range"))?.max(1);
    let token = context.meta.get_progress_token();
    let _asleep = Asleep::new();
    for step in 1..=steps {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(ms.into()) / steps) => {}
            () = context.ct.cancelled() => return Ok(failure("cancelled")),
        }
        if let Some(token) = token.clone() {
            let progress = ProgressNotificationParam::new(token, step.into());
            // A client that has gone shows elsewhere: its request is cancelled.
            let _ = context.peer.notify_progress(progress.with_total(steps.into())).await;
        }
    }
    Ok(said(format!("slept {ms} ms")))
}

fn said(words: impl Into<String>) -> CallToolResult {
    CallToolResult::success(vec![ContentBlock::text(words)])
}

fn failure(words: impl Into<String>) -> CallToolResult {
    CallToolResult::error(vec![ContentBlock::text(words)])
}

fn invalid(message: impl Into<Cow<'static, str>>) -> ErrorData {
    ErrorData::invalid_params(message, None)
}

fn internal(error: serde_json::Error) -> ErrorData {
    ErrorData::internal_error(error.to_string(), None)
}

fn int(args: &JsonObject, key: &str) -> Answer<i64> {
    let missing = || invalid(format!("{key} must be a whole number"));
    args.get(key).and_then(Value::as_i64).ok_or_else(missing)
}

fn text<'a>(args: &'a JsonObject, key: &str) -> Answer<&'a str> {
    let missing = || invalid(format!("{key} must be a text"));
    args.get(key).and_then(Value::as_str).ok_or_else(missing)
}
