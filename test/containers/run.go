package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Place is where cases run: an engine with the fixture's images and nothing else, which has one case at a time.
type Place struct {
	// Env is the commands' environment; its PATH has a docker.
	Env []string
	// Start starts a command, perhaps in a network namespace of the place's own.
	Start func(*exec.Cmd) error
	// Probe is the path of the probe.
	Probe string
}

// stepLimit is the time for one command. It ends one that hangs, and none that waits for a busy machine.
const stepLimit = 3 * time.Minute

// prelude are the functions that commands may use.
const prelude = `eventually() { eventually_n=0; until "$@" >/dev/null 2>&1; do eventually_n=$((eventually_n + 1)); [ $eventually_n -lt 600 ] || return 1; sleep 0.1; done; }
tty() { if [ $# = 1 ]; then tty_line=$1; else tty_line=; for tty_word; do tty_line="$tty_line '$(printf %s "$tty_word" | sed "s/'/'\\\\''/g")'"; done; fi; TERM=xterm script -qec "$tty_line" /dev/null </dev/null; }
`

// Run types the case's commands one after the other in dir, an empty folder, and returns the answers. What a command has left in the background
// ends with it: a later start of "c1" would meet another case's.
func (p *Place) Run(ctx context.Context, c *Case, dir string) ([][]string, error) {
	for _, f := range c.files {
		name := filepath.Join(dir, f.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(name, f.Data, 0o644); err != nil {
			return nil, err
		}
	}
	n := normal{dir: dir, probe: p.Probe}
	raw := make([]answer, len(c.Steps))
	for i, s := range c.Steps {
		var err error
		if raw[i], err = p.step(ctx, s.Line, dir); err != nil {
			return nil, fmt.Errorf("$ %s: %w", s.Line, err)
		}
		n.see(raw[i])
	}
	answers := make([][]string, len(raw))
	for i, a := range raw {
		answers[i] = n.answer(a)
	}
	return answers, nil
}

// Clean removes what a case has left.
func (p *Place) Clean(ctx context.Context) error {
	_, err := p.step(ctx, `ids=$(docker ps -aq); [ -z "$ids" ] || docker rm -fv $ids; docker volume prune -af 2>/dev/null || docker volume prune -f; docker network prune -f
		ids=$(docker images --format '{{.Repository}}:{{.Tag}} {{.ID}}' | awk '$1 !~ /^(`+strings.Join(Images(), "|")+`):/ {print $2}'); [ -z "$ids" ] || docker rmi -f $ids`, "/")
	return err
}

// answer is what a command printed on its standard output and error, in lines, and its exit code.
type answer struct {
	out  [2][]string
	code int
}

func (p *Place) step(ctx context.Context, line, dir string) (a answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	// Files, not pipes: what a command leaves in the background must not hold the next one up.
	var out [2]*os.File
	for i := range out {
		f, err := os.CreateTemp("", "step.")
		if err != nil {
			return a, err
		}
		defer os.Remove(f.Name())
		defer f.Close()
		out[i] = f
	}
	cmd := exec.CommandContext(ctx, "sh", "-c", prelude+line)
	cmd.Env = append(slices.Clone(p.Env), "PROBE="+p.Probe, "HOME="+dir)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out[0], out[1]
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := p.Start(cmd); err != nil {
		return a, err
	}
	// As long as nobody has waited for the shell, its process group is nobody else's.
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
	if kerr := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err == nil {
		err = kerr
	}
	if werr := cmd.Wait(); err == nil {
		err = werr
	}
	var exit *exec.ExitError
	if ctx.Err() != nil {
		err = fmt.Errorf("not done after %v", stepLimit)
	}
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		return a, err
	}
	if exit != nil {
		a.code = exit.ExitCode()
	}
	for i := range out {
		if _, err := out[i].Seek(0, io.SeekStart); err != nil {
			return a, err
		}
		data, err := io.ReadAll(out[i])
		if err != nil {
			return a, err
		}
		for l := range strings.Lines(string(data)) {
			l = strings.TrimRight(l, " \r\n")
			if strings.HasPrefix(l, "{") {
				a.out[i] = append(a.out[i], fields(l)...)
			} else {
				a.out[i] = append(a.out[i], l)
			}
		}
	}
	return a, nil
}

// fields are the fields of a JSON object, each as "path: value", sorted by path; the line itself where it is none.
func fields(line string) []string {
	var v map[string]any
	d := json.NewDecoder(strings.NewReader(line))
	d.UseNumber()
	if d.Decode(&v) != nil || d.More() || len(v) == 0 {
		return []string{line}
	}
	var out []string
	var walk func(path string, v any)
	walk = func(path string, v any) {
		if m, ok := v.(map[string]any); ok && len(m) > 0 {
			for k, e := range m {
				walk(path+"."+k, e)
			}
			return
		}
		var text strings.Builder
		e := json.NewEncoder(&text)
		e.SetEscapeHTML(false)
		if err := e.Encode(v); err != nil {
			panic(err) // it has just been decoded
		}
		out = append(out, path+": "+strings.TrimSpace(text.String()))
	}
	walk("", v)
	slices.Sort(out)
	return out
}

// normal takes out of answers what no two runs have in common. Ids get numbers in the order of their first appearance.
type normal struct {
	dir, probe string
	seen       []string // whole ids, of all answers
	ids        []string
}

var (
	longID   = regexp.MustCompile(`\b(sha256:)?[0-9a-f]{64}\b`)
	shortID  = regexp.MustCompile(`\b[0-9a-f]{12}\b`)
	replaced = []struct {
		what *regexp.Regexp
		by   string
	}{
		{regexp.MustCompile(`\b(20\d\d)-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)`), "<time>"},
		{regexp.MustCompile(`\b(20\d\d)-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)? [+-]\d{4} [A-Z]+`), "<time>"},
		{regexp.MustCompile(`\bUp (\d+ (second|minute)s?|Less than a second|About a minute)`), "Up <ago>"},
		{regexp.MustCompile(`(\d+ (second|minute|hour)s?|Less than a second|About a minute|About an hour) ago`), "<ago> ago"},
		{regexp.MustCompile(`("execDuration":")\d+"`), `${1}<seconds>"`},
		{regexp.MustCompile(`\b172\.\d+\.\d+\.\d+\b`), "<ip>"},
		{regexp.MustCompile(`\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b`), "<mac>"},
		{regexp.MustCompile(`(0\.0\.0\.0|\[?::\]?|127\.0\.0\.1):(3[2-9]|4|5|6)\d{3,4}\b`), "$1:<port>"},
		{regexp.MustCompile(`/[^\s":,]*/(record|conex-suite|conex-test)\.[^\s":,]*`), "<path>"},
		{regexp.MustCompile(`/proc/[1-9]\d*/ns/`), "/proc/<pid>/ns/"},
		{regexp.MustCompile(`(Pid"?: )[1-9]\d*`), "${1}<pid>"},
	}
)

// see takes note of the ids in an answer, which tell short ones from numbers.
func (n *normal) see(a answer) {
	for _, l := range slices.Concat(a.out[:]...) {
		for _, id := range longID.FindAllString(l, -1) {
			if !strings.HasPrefix(id, "sha256:") {
				n.seen = append(n.seen, id)
			}
		}
	}
}

// answer is an answer as it is kept.
func (n *normal) answer(a answer) []string {
	var lines []string
	for i, kind := range []string{"| ", "! "} {
		for _, l := range a.out[i] {
			lines = append(lines, strings.TrimRight(kind+n.line(l), " "))
		}
	}
	if a.code != 0 {
		lines = append(lines, "= "+strconv.Itoa(a.code))
	}
	return lines
}

func (n *normal) line(s string) string {
	for _, r := range []struct{ path, name string }{{n.probe, "PROBE"}, {n.dir, "DIR"}} {
		if r.path != "" {
			s = strings.ReplaceAll(s, r.path, r.name)
		}
	}
	s = longID.ReplaceAllStringFunc(s, func(id string) string {
		if strings.HasPrefix(id, "sha256:") {
			return "<sha256>"
		}
		return n.id(id)
	})
	s = shortID.ReplaceAllStringFunc(s, func(id string) string {
		word := !strings.ContainsAny(id, "abcdef") || !strings.ContainsAny(id, "0123456789")
		if word && !slices.ContainsFunc(n.seen, func(long string) bool { return strings.HasPrefix(long, id) }) {
			return id // an id is like that once in three hundred, as a number of twelve digits always is
		}
		return n.id(id)
	})
	for _, r := range replaced {
		s = r.what.ReplaceAllString(s, r.by)
	}
	return s
}

func (n *normal) known(id string) int {
	return slices.IndexFunc(n.ids, func(known string) bool { return strings.HasPrefix(known, id) || strings.HasPrefix(id, known) })
}

func (n *normal) id(id string) string {
	i := n.known(id)
	if i < 0 {
		n.ids = append(n.ids, id)
		i = len(n.ids) - 1
	}
	return "<id" + strconv.Itoa(i+1) + ">"
}
