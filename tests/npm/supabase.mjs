// The API as a Supabase application uses it: supabase-js in front of a real PostgREST, as anon, as two users, and as the
// back end. Ends with an error where something is not as it should be.
//
//   node supabase.mjs NODE_MODULES URL ALICE ALICES_TOKEN BOBS_TOKEN SERVICE_TOKEN MCP_SERVER_CONFIG

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, url, alice, alicesToken, bobsToken, serviceToken, config] = process.argv.slice(2);
const { createClient } = createRequire(pathToFileURL(`${modules}/`))("@supabase/supabase-js");

// Supabase serves PostgREST below /rest/v1.
const client = (token) =>
  createClient(url, "anon", {
    auth: { persistSession: false, autoRefreshToken: false },
    global: {
      fetch: (address, options) => {
        const headers = new Headers(options.headers);
        headers.delete("Authorization");
        if (token) headers.set("Authorization", `Bearer ${token}`);
        return fetch(address.replace("/rest/v1", ""), { ...options, headers });
      },
    },
  });
const anon = client(null);
const users = { alice: client(alicesToken), bob: client(bobsToken) };
const service = client(serviceToken);

const good = async (request) => {
  const { data, error } = await request;
  assert.equal(error, null, JSON.stringify(error));
  return data;
};
const refused = async (request, status, code, what) => {
  const answer = await request;
  assert.equal(answer.error?.code, code, `${what}: ${JSON.stringify(answer)}`);
  assert.equal(answer.status, status, `${what}: ${JSON.stringify(answer)}`);
  return answer.error;
};

// ── The back end: vault, limits, cleanup, system servers ──

const sealed = await good(service.rpc("encrypt_token", { token: "grüße" }));
assert.match(sealed, /^\\x[0-9a-f]{70}$/);
assert.equal(await good(service.rpc("decrypt_token", { encrypted: sealed })), "grüße");
const bound = await good(service.rpc("encrypt_config", { config: { a: 1 }, context: "row 1" }));
assert.deepEqual(await good(service.rpc("decrypt_config", { encrypted: bound, context: "row 1" })), { a: 1 });
await refused(service.rpc("decrypt_config", { encrypted: bound }), 400, "22000", "the wrong context");
// With a single key there is nothing to rotate to.
const rotation = await refused(service.rpc("rotate_vault_key"), 500, "F0000", "one key");
assert.equal(rotation.message, "Both app.vault_old_key and app.vault_new_key must be set for rotation");
assert.equal(
  await good(service.rpc("check_rate_limit", { p_server_id: "docs", p_user_id: alice, p_limit_per_minute: 9 })),
  true,
);
assert.equal(await good(service.rpc("cleanup_old_job_results")), 0);
assert.deepEqual(await good(service.rpc("cleanup_job_results_manual", { p_days_completed: 7, p_days_orphaned: 1 })), [
  { deleted_completed: 0, deleted_orphaned: 0, total_deleted: 0 },
]);
const [system] = await good(
  service.from("system_servers").insert({ id: "docs", name: "Docs", config: JSON.parse(config) }).select(),
);
assert.match(system.ref_id, /^[0-9a-f-]{36}$/);
assert.deepEqual(await good(service.rpc("refresh_expired_cache_entries")), []);
assert.equal((await good(service.rpc("nexus_hub_health"))).preloaded, true);
await good(service.rpc("insert_user_api_key", { p_user_id: alice, p_service: "openai", p_api_key: "sk-1" }));
assert.equal(await good(service.rpc("get_user_api_key", { p_user_id: alice, p_service: "openai" })), "sk-1");

// ── A user: own servers and jobs ──

const add = { p_server_id: "demo", p_name: "Demo", p_config: JSON.parse(config) };
const server = await good(users.alice.rpc("add_server", add));
assert.deepEqual(await good(users.alice.from("user_servers").select("id, server_id, enabled")), [
  { id: server, server_id: "demo", enabled: true },
]);
assert.deepEqual(
  (await good(users.alice.rpc("list_servers"))).map((row) => [row.kind, row.server_id]),
  [["system", "docs"], ["user", "demo"]],
);
const job = await good(
  users.alice.rpc("create_job", {
    p_user_id: alice, p_job_type: "tool_invoke", p_server_id: "demo", p_tool_name: "echo", p_params: { text: "hello" },
  }),
);
const [ended] = await good(users.alice.rpc("wait_for_job", { p_job_id: job }));
assert.equal(ended.status, "completed", ended.error);
assert.equal(ended.result.content[0].text, "hello");
const [status] = await good(users.alice.rpc("get_job_status", { p_job_id: job }));
assert.deepEqual(status, ended);
// The same without a function.
const [inserted] = await good(
  users.alice
    .from("job_results")
    .insert({ user_id: alice, job_type: "tool_invoke", server_id: "docs", tool_name: "add", params: { a: 2, b: 3 } })
    .select(),
);
assert.equal((await good(users.alice.rpc("wait_for_job", { p_job_id: inserted.id })))[0].status, "completed");
assert.equal((await good(users.alice.from("job_results").select("id").eq("status", "completed"))).length, 2);

// What is to be offered to a model, asked for as applications do.
const sync = await good(users.alice.rpc("sync_server", { p_server_ref_id: server }));
assert.equal((await good(users.alice.rpc("wait_for_job", { p_job_id: sync })))[0].status, "completed");
await good(service.rpc("sync_server", { p_server_ref_id: system.ref_id }));
const tools = async (user) =>
  (await good(
    user
      .from("tool_cache")
      .select("*")
      .or(`user_id.eq.${alice},user_id.is.null`)
      .eq("enabled", true)
      .gte("expires_at", new Date().toISOString())
      .order("namespaced_name"),
  )).map((tool) => tool.namespaced_name);
while (!(await tools(users.bob)).includes("docs__add")) await new Promise((go) => setTimeout(go, 50));
assert.ok((await tools(users.alice)).includes("demo__add") && (await tools(users.alice)).includes("docs__add"));
assert.ok(!(await tools(users.bob)).includes("demo__add"));
await good(users.alice.from("tool_cache").update({ enabled: false }).eq("namespaced_name", "demo__add"));
assert.ok(!(await tools(users.alice)).includes("demo__add"));

// ── Another user: nothing of it ──

for (const table of ["user_servers", "job_results", "api_keys", "server_syncs"]) {
  assert.deepEqual(await good(users.bob.from(table).select(table === "server_syncs" ? "server_id" : "id")), [], table);
}
assert.deepEqual(await good(users.bob.rpc("get_job_status", { p_job_id: job })), []);
assert.equal(await good(users.bob.rpc("cancel_job", { p_job_id: job })), false);
assert.equal(await good(users.bob.rpc("retry_job", { p_job_id: job })), false);
assert.equal(await good(users.bob.rpc("delete_server", { p_id: server })), false);
assert.equal(await good(users.bob.rpc("sync_server", { p_server_ref_id: server })), null);
await refused(users.bob.rpc("add_server", { ...add, p_user_id: alice }), 403, "42501", "a server for somebody else");

// ── What no user may, and anon not at all ──

const forbidden = {
  encrypt_token: { token: "t" }, decrypt_token: { encrypted: sealed }, rotate_vault_key: {}, cleanup_old_job_results: {},
  cleanup_job_results_manual: {}, check_rate_limit: { p_server_id: "s", p_user_id: alice, p_limit_per_minute: 1 },
  http_get: { url: "https://host.example/" }, nexus_hub_health: {}, nexus_hub_metrics: {}, refresh_expired_cache_entries: {},
  get_user_api_key: { p_user_id: alice, p_service: "openai" },
};
const usual = {
  list_servers: {}, add_server: add, create_job: { p_user_id: null, p_job_type: "tool_invoke", p_server_id: "docs" },
  get_job_status: { p_job_id: job }, sync_server: { p_server_ref_id: server }, delete_server: { p_id: server },
};
for (const [name, args] of Object.entries(forbidden)) {
  await refused(users.alice.rpc(name, args), 403, "42501", name);
}
for (const [name, args] of Object.entries({ ...forbidden, ...usual })) {
  await refused(anon.rpc(name, args), 401, "42501", name);
}
await refused(users.alice.from("user_servers").select("*"), 403, "42501", "ciphertexts");
await refused(users.alice.from("job_results").update({ status: "completed" }).eq("id", job), 403, "42501", "results");
for (const table of ["user_servers", "system_servers", "job_results", "tool_cache", "api_keys", "nexus_hub_alerts"]) {
  await refused(anon.from(table).select(), 401, "42501", table);
}
// Errors help.
const error = await refused(users.alice.rpc("add_server", { ...add, p_server_id: "bad", p_config: {} }), 400, "22023", "a config");
assert.ok(error.message.startsWith("bad server config: ") && error.hint.includes("https://host/mcp"), JSON.stringify(error));
process.stdout.write("all is well\n");
