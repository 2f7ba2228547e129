// The dialog for the API key, where the server asks for one.

import { byId } from "./dom.js";

let asking = null; // one dialog for all requests that wait for the key

/** What someone types into the dialog; "" where they close it. */
export function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      resolve(dialog.returnValue === "use" ? byId("key").value : "");
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
