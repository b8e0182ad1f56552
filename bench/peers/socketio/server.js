// A Socket.IO server as its documentation shows it: a device joins the room that it names, and POST /api/batch emits to
// rooms. With RECOVERY=1 it keeps what it emitted for two minutes (connection state recovery).
import { createServer } from "node:http";
import { Server } from "socket.io";

const recovery = process.env.RECOVERY === "1";
const server = createServer((request, response) => {
  if (request.method !== "POST" || request.url !== "/api/batch") return;
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    for (const { publish } of JSON.parse(Buffer.concat(parts)).commands) io.to(publish.channel).emit("n", publish.data);
    response.setHeader("Content-Type", "application/json");
    response.end("{}");
  });
});
const io = new Server(server, {
  transports: ["websocket"],
  perMessageDeflate: false,
  ...(recovery ? { connectionStateRecovery: { maxDisconnectionDuration: 120_000, skipMiddlewares: true } } : {}),
});
io.on("connection", (socket) => {
  if (!socket.recovered) socket.join(socket.handshake.auth.room);
});
server.listen(Number(process.argv[2]), "127.0.0.1", 4096, () => console.log(`listens on ${server.address().port}`));
