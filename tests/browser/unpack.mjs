// Unpacks the browser, its libraries and its fonts below the folder that TMPDIR names, and writes `browser` there, which starts it with them.
import { writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { inflate } from "@sparticuz/chromium";

const packed = join(import.meta.dirname, "node_modules/@sparticuz/chromium/bin");
for (const file of ["chromium.br", "al2023.tar.br", "fonts.tar.br", "swiftshader.tar.br"]) await inflate(join(packed, file));
const folder = tmpdir();
// Theirs looks for fonts in folders of AWS Lambda alone, and without any the browser ends as soon as it draws a text.
const fonts = `<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>${folder}/fonts</dir>
  <cachedir>${folder}/fonts-cache</cachedir>
</fontconfig>
`;
await writeFile(join(folder, "fonts/fonts.conf"), fonts);
const start = `#!/bin/sh
LD_LIBRARY_PATH="${folder}/al2023/lib" FONTCONFIG_PATH="${folder}/fonts" exec "${folder}/chromium" "$@"
`;
await writeFile(join(folder, "browser"), start, { mode: 0o755 });
