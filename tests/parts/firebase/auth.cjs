// Firebase Auth's emulator alone, in one process on one port: `node auth.cjs PROJECT HOST PORT`.
// It uses modules inside firebase-tools, so the version in package.json is exact.
const { createApp } = require("firebase-tools/lib/emulator/auth/server");
const { SingleProjectMode } = require("firebase-tools/lib/emulator/auth/index");

const [project, host, port] = process.argv.slice(2);
createApp(project, SingleProjectMode.NO_WARNING, new Map()).then((app) => {
  const server = app.listen(Number(port), host);
  process.on("SIGTERM", () => server.close(() => process.exit(0)));
});
