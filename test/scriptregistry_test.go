package test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// scriptRegistry is a script's
//
//	registry VARIABLE [USER:HASH]
//
// It starts an empty docker-registry in the world's network namespace, which lets USER alone in if there is one (HASH is htpasswd's
// bcrypt), and sets VARIABLE to its address.
func (w *world) scriptRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: registry VARIABLE [USER:HASH]")
	}
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		ts.Fatalf("needs docker-registry: apt-get install docker-registry")
	}
	var l net.Listener
	w.inNetns(func() { l, err = net.Listen("tcp", "127.0.0.1:0") })
	ts.Check(err)
	addr := l.Addr().String()
	l.Close() // nobody else is in this network namespace
	dir := ts.MkAbs(".registry-" + args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}\nhttp: {addr: %q}\n",
		filepath.Join(dir, "data"), addr)
	if len(args) > 1 {
		file := filepath.Join(dir, "htpasswd")
		ts.Check(os.WriteFile(file, []byte(args[1]+"\n"), 0o600))
		config += fmt.Sprintf("auth: {htpasswd: {realm: registry, path: %q}}\n", file)
	}
	file := filepath.Join(dir, "config.yml")
	ts.Check(os.WriteFile(file, []byte(config), 0o600))
	var out strings.Builder
	cmd := exec.Command("nsenter", fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), w.netns.Fd()), bin, "serve", file)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	cmd.Stdout, cmd.Stderr = &out, &out
	ts.Check(cmd.Start())
	ts.Defer(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var conn net.Conn
		w.inNetns(func() { conn, err = net.Dial("tcp", addr) })
		if err == nil {
			conn.Close()
			ts.Setenv(args[0], addr)
			return
		}
	}
	ts.Fatalf("the registry does not come up: %v", err)
}
