package test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestDoctorAsUser looks with a user's eyes at an installation that is root's: all that he may see, and what he may not in words.
func TestDoctorAsUser(t *testing.T) {
	w := bareWorld(t)
	w.conex("volume", "create", "vol")
	dir, err := os.MkdirTemp("/var/tmp", "conex-user.") // the suite's own folder is root's alone
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "conex")
	from, err := os.Open(w.bin)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(bin, os.O_CREATE|os.O_WRONLY, 0o755)
	if err == nil {
		_, err = io.Copy(to, from)
	}
	if err == nil {
		err = to.Close()
	}
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"doctor"}, []string{"this is user 65534: containers need root for now", "> sudo conex doctor", "firewall rules take root to see", "could not be looked at."}},
		{[]string{"doctor", "--format", "json"}, []string{`"level":"unknown"`}},
	} {
		cmd := exec.Command(bin, c.args...)
		cmd.Env, cmd.Dir = append(w.env, "CONEX_CONFIG="+filepath.Join(dir, "none.toml")), dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run() // its exit code is the machine's
		if errs.Len() > 0 && c.args[len(c.args)-1] == "doctor" {
			t.Errorf("%v: %v, standard error: %s", c.args, err, errs.String())
		}
		for _, s := range c.want {
			if !strings.Contains(out.String(), s) {
				t.Errorf("%v: %v, no %q in:\n%s", c.args, err, s, out.String())
			}
		}
	}
	for _, args := range [][]string{{"ps"}, {"run", "--rm", "busybox"}, {"network", "ls"}} {
		cmd := exec.Command(bin, args...)
		cmd.Env, cmd.Dir = append(w.env, "CONEX_CONFIG="+filepath.Join(dir, "none.toml")), dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err == nil || bytes.Count(out, []byte("\n")) != 1 {
			t.Errorf("%v: %v, want one line:\n%s", args, err, out)
		}
	}
}
