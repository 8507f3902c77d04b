// Bundles src/ into the folder of the package that `crossfade serve` reads: npm ci && npm run build
//
// What it writes is committed, so that users need no Node. Each file says which sources it was made
// of, which tests/serve/desk/test_desk_bundle.py compares with the sources that are there.

import { createHash } from "node:crypto";
import { mkdir, readFile, readdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { build } from "esbuild";

const HERE = import.meta.dirname;
const PAGE = path.join(HERE, "..", "python", "crossfade", "serve", "page");
const MADE_BY = ["build.mjs", "package-lock.json", "package.json"];

/** One hash of all sources: of a line a file, sorted by name, with the file's own hash. */
async function hashOfSources() {
  const inside = await readdir(path.join(HERE, "src"), { recursive: true, withFileTypes: true });
  const names = inside
    .filter((entry) => entry.isFile())
    .map((entry) => path.relative(HERE, path.join(entry.parentPath, entry.name)));
  const sha256 = (data) => createHash("sha256").update(data).digest("hex");
  const lines = [...names, ...MADE_BY].map((name) => name.split(path.sep).join("/")).sort();
  const hashes = await Promise.all(
    lines.map((name) => readFile(path.join(HERE, name)).then(sha256)),
  );
  return sha256(lines.map((name, i) => `${hashes[i]}  ${name}\n`).join(""));
}

/** The licences of the packages whose files are in the bundle. */
async function notices(inputs) {
  const packages = new Set();
  for (const input of inputs) {
    const found = /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(input);
    if (found) packages.add(found[1]);
  }
  const parts = [];
  for (const name of [...packages].sort()) {
    const folder = path.join(HERE, "node_modules", name);
    const { version, license } = JSON.parse(
      await readFile(path.join(folder, "package.json"), "utf8"),
    );
    const file = (await readdir(folder)).find((x) => /^licen[cs]e/i.test(x));
    if (!file) throw new Error(`${name} has no file of its licence`);
    const text = (await readFile(path.join(folder, file), "utf8")).trim();
    parts.push(`${name} ${version} (${license})\n\n${text}\n`);
  }
  const rule = `\n${"-".repeat(80)}\n\n`;
  return `The page of crossfade's server holds these packages.\n${rule}${parts.join(rule)}`;
}

const sources = await hashOfSources();
const banner = `/* The mixing desk, made of the sources ${sources}. Licences: NOTICES.txt */`;
const result = await build({
  entryPoints: { app: path.join(HERE, "src", "main.js"), style: path.join(HERE, "src", "app.css") },
  outdir: PAGE,
  write: false,
  bundle: true,
  minify: true,
  format: "esm",
  target: ["chrome111", "firefox114", "safari16.4"],
  legalComments: "none",
  charset: "utf8",
  metafile: true,
  absWorkingDir: HERE,
  banner: { js: banner, css: banner },
});

await mkdir(PAGE, { recursive: true });
const [js, css] = [".js", ".css"].map((end) =>
  result.outputFiles.find((f) => f.path.endsWith(end)),
);
await writeFile(path.join(PAGE, "app.js"), js.contents);
await writeFile(path.join(PAGE, "app.css"), css.contents);
const index = await readFile(path.join(HERE, "src", "index.html"), "utf8");
await writeFile(path.join(PAGE, "index.html"), `${index.trimEnd()}\n<!-- sources ${sources} -->\n`);
await writeFile(path.join(PAGE, "NOTICES.txt"), await notices(Object.keys(result.metafile.inputs)));
console.log(`${PAGE}: app.js has ${js.contents.length} bytes, app.css ${css.contents.length}`);
