// The vault of the hub's edge functions, on WebCrypto: what it seals SQL must open, and the other way round.
//
//   node webcrypto.mjs seal KEY TEXT CONTEXT          prints the ciphertext in hex
//   node webcrypto.mjs open KEY CIPHERTEXT CONTEXT    prints the text, line ends as \n
//   node webcrypto.mjs open-or-not KEY CIPHERTEXT CONTEXT    the same, or nothing when the key does not fit

import { webcrypto } from "node:crypto";

const [action, keyHex, value, context] = process.argv.slice(2);
const key = await webcrypto.subtle.importKey("raw", Buffer.from(keyHex, "hex"), "AES-GCM", false, ["encrypt", "decrypt"]);
const parameters = (iv) => ({
  name: "AES-GCM",
  iv,
  tagLength: 128,
  ...(context ? { additionalData: new TextEncoder().encode(context) } : {}),
});

if (action === "seal") {
  const iv = webcrypto.getRandomValues(new Uint8Array(12));
  const sealed = await webcrypto.subtle.encrypt(parameters(iv), key, new TextEncoder().encode(value));
  console.log(Buffer.concat([iv, Buffer.from(sealed)]).toString("hex"));
} else {
  const bytes = Buffer.from(value, "hex");
  try {
    const opened = await webcrypto.subtle.decrypt(parameters(bytes.subarray(0, 12)), key, bytes.subarray(12));
    console.log(new TextDecoder().decode(opened).replaceAll("\n", "\\n"));
  } catch (error) {
    if (action === "open") throw error;
  }
}
