// Package git fetches trees of files from git repositories, by executing the host's git: its protocols, transports and object formats
// are more than conex wants to have of its own, and a repository's owner attacks git rather than us (decision 16). It owns no files.
//
// git is told all that it needs, so neither the system's nor the user's configuration counts: no hooks, filters, helpers, templates or
// aliases, no prompts, no other transports than http, https, git and ssh.
package git

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"conex/internal/linux/slack"
)

// ErrMissing says that the host has no git.
var ErrMissing = errors.New("git repositories need the program git, which is not in PATH: install it")

// Client runs git.
type Client struct {
	// Header gives what to send as "Authorization" to a remote over http; nil or "": nothing.
	Header func(host string) (string, error)
	// AuthSock is the socket of an ssh agent, "" for SSH_AUTH_SOCK's. Keys are files of private keys to use instead.
	AuthSock string
	Keys     []string
}

// Time bounds: of a question to a remote, and of a transfer that brings next to nothing.
const (
	askTime  = 5 * time.Minute
	slowTime = time.Minute
)

// maxAnswer bounds in bytes what is kept of git's output.
const maxAnswer = 1 << 20

// command is one execution of git.
type command struct {
	args []string
	// dir and tree are --git-dir and --work-tree; "" for none.
	dir, tree string
	// remote is whom the command talks to, whose Authorization header is sent.
	remote string
}

// passed are variables of the caller's that git gets too: they say how the network is reached.
var passed = []string{
	"PATH", "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
	"GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE",
}

// environment isolates git from the host.
func (c *Client) environment(cmd command) ([]string, error) {
	env := []string{
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull, "HOME=" + os.DevNull, "XDG_CONFIG_HOME=" + os.DevNull,
		"GIT_ATTR_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0", "SSH_ASKPASS_REQUIRE=never", "LC_ALL=C",
		"GIT_ALLOW_PROTOCOL=http:https:git:ssh", "GIT_PROTOCOL_FROM_USER=0", "GIT_LFS_SKIP_SMUDGE=1", "GIT_ADVICE=0",
		"GIT_SSH_COMMAND=" + c.ssh(), "GIT_SSH_VARIANT=ssh",
	}
	for _, k := range passed {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	sock := c.AuthSock
	if sock == "" {
		sock = os.Getenv("SSH_AUTH_SOCK")
	}
	if sock != "" {
		env = append(env, "SSH_AUTH_SOCK="+sock)
	}
	settings := [][2]string{
		{"core.hooksPath", os.DevNull}, {"core.fsmonitor", "false"}, {"core.autocrlf", "false"}, {"core.fileMode", "true"},
		{"core.symlinks", "true"}, {"core.protectHFS", "true"}, {"core.protectNTFS", "true"},
		{"credential.helper", ""}, {"protocol.file.allow", "never"}, {"protocol.ext.allow", "never"}, {"gc.auto", "0"}, {"maintenance.auto", "false"},
		{"init.defaultBranch", "master"}, {"advice.detachedHead", "false"}, {"fetch.recurseSubmodules", "false"}, {"submodule.recurse", "false"},
		{"http.lowSpeedLimit", "1000"}, {"http.lowSpeedTime", strconv.Itoa(int(slowTime / time.Second))}, {"safe.directory", "*"},
	}
	if c.Header != nil && strings.HasPrefix(cmd.remote, "http") {
		h, err := c.Header(hostOf(cmd.remote))
		if err != nil {
			return nil, err
		}
		if h != "" {
			// By the environment, since arguments show in ps.
			settings = append(settings, [2]string{"http." + scope(cmd.remote) + ".extraHeader", "Authorization: " + h})
		}
	}
	env = append(env, "GIT_CONFIG_COUNT="+strconv.Itoa(len(settings)))
	for i, kv := range settings {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, kv[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, kv[1]))
	}
	return env, nil
}

// ssh is the command for remotes over ssh, in the shell's language: the user's own keys and known hosts, none of the options that
// ~/.ssh/config might have.
func (c *Client) ssh() string {
	cmd := "ssh -F " + os.DevNull + " -o BatchMode=yes -o StrictHostKeyChecking=accept-new"
	if len(c.Keys) > 0 {
		cmd += " -o IdentitiesOnly=yes"
	}
	for _, k := range c.Keys {
		cmd += " -i '" + strings.ReplaceAll(k, "'", `'\''`) + "'"
	}
	return cmd
}

// scope is the part of the net that a remote's header is for: the remote alone, but all of github.com, as BuildKit has it, for submodules.
func scope(remote string) string {
	for _, p := range []string{"https://github.com/", "https://www.github.com/"} {
		if strings.HasPrefix(remote, p) {
			return p
		}
	}
	return remote
}

// run executes git and returns its standard output.
func (c *Client) run(ctx context.Context, cmd command) (string, error) {
	bin, err := exec.LookPath("git")
	if err != nil {
		return "", ErrMissing
	}
	env, err := c.environment(cmd)
	if err != nil {
		return "", err
	}
	var args []string
	if cmd.dir != "" {
		args = append(args, "--git-dir="+cmd.dir)
	}
	if cmd.tree != "" {
		args = append(args, "--work-tree="+cmd.tree)
	}
	args = append(args, cmd.args...)
	var out, errs bounded
	start := func(flags uintptr) error {
		x := exec.CommandContext(ctx, bin, args...)
		x.Env, x.Dir = env, "/"
		if cmd.tree != "" {
			x.Dir = cmd.tree
		}
		x.Stdout, x.Stderr = &out, &errs
		x.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: flags}
		x.Cancel = func() error { return syscall.Kill(-x.Process.Pid, syscall.SIGKILL) }
		x.WaitDelay = time.Second
		done := make(chan error, 1)
		go func() {
			// The kernel sends the signal when the thread that forked dies: this one stays until git has ended.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			slack.Usual()
			done <- x.Run()
		}()
		return <-done
	}
	// git has helpers of its own, which know nothing of our death: with the first process of a namespace all go.
	err = start(syscall.CLONE_NEWPID)
	if errors.Is(err, syscall.EPERM) {
		err = start(0)
	}
	switch {
	case err == nil:
		return out.String(), nil
	case ctx.Err() != nil:
		return "", ctx.Err()
	}
	return "", &runError{verb: cmd.args[0], text: errs.String(), remote: cmd.remote, err: err}
}

// runError is what git complains of.
type runError struct {
	verb, text, remote string
	err                error
}

// Error is one line: the first of git's that says what is wrong.
func (e *runError) Error() string {
	said := ""
	for line := range strings.Lines(e.text) {
		line = strings.TrimSpace(line)
		for _, p := range []string{"fatal: ", "error: ", "remote: ", "ERROR: ", "ssh: "} {
			if rest, ok := strings.CutPrefix(line, p); ok && said == "" {
				said = rest
			}
		}
	}
	if said == "" {
		said = strings.TrimSpace(e.text)
		said, _, _ = strings.Cut(said, "\n")
	}
	if said == "" {
		said = e.err.Error()
	}
	if e.remote != "" {
		said = strings.ReplaceAll(said, e.remote, shown(e.remote))
	}
	said = strings.Map(func(r rune) rune {
		if control(r) || r == 0x7f {
			return ' '
		}
		return r
	}, said)
	if strings.Contains(said, "terminal prompts disabled") || strings.Contains(said, "could not read Username") || strings.Contains(said, "Authentication failed") {
		return "the remote asks for a login: give a token with --secret id=GIT_AUTH_TOKEN"
	}
	if len(said) > 300 {
		said = said[:300] + "..."
	}
	return "git " + e.verb + ": " + said
}

// Unwrap tells a full disk from the rest.
func (e *runError) Unwrap() error {
	if strings.Contains(e.text, "No space left on device") {
		return syscall.ENOSPC
	}
	return e.err
}

// has reports whether git said one of the words.
func has(err error, words ...string) bool {
	var e *runError
	if !errors.As(err, &e) {
		return false
	}
	for _, w := range words {
		if strings.Contains(e.text, w) {
			return true
		}
	}
	return false
}

// bounded keeps the beginning of what is written to it.
type bounded struct{ b bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if room := maxAnswer - b.b.Len(); room > 0 {
		b.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (b *bounded) String() string { return b.b.String() }
