import { html, render } from "htm/preact";
import { start } from "./desk.js";
import { App } from "./views/app.js";

render(html`<${App} />`, document.getElementById("desk"));
start();
