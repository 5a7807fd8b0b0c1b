package portmap

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestPass speaks for two bridges in FORWARD chains that drop, as iptables and ip6tables then list them, and takes it back.
func TestPass(t *testing.T) {
	command := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		var said strings.Builder
		cmd.Stderr = &said // it warns of iptables-legacy's tables, which another test has made
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, said.String())
		}
		return string(out)
	}
	for _, name := range []string{"iptables-nft", "ip6tables-nft"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name + " is not installed, so nobody can read what Pass writes")
		}
	}
	if drops, err := Drops(Table{}); err != nil || drops {
		t.Fatalf("Drops %v %v in an empty namespace", drops, err)
	}
	if changed, err := Pass([]string{"conex0"}); err != nil || changed != nil {
		t.Fatalf("Pass %v %v in an empty namespace", changed, err)
	}
	for _, name := range []string{"iptables-nft", "ip6tables-nft"} {
		command(name, "-P", "FORWARD", "DROP")
		command(name, "-A", "FORWARD", "-o", "docker0", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT")
		command(name, "-A", "FORWARD", "-i", "conex0", "-p", "tcp", "-j", "ACCEPT") // the administrator's own: not ours
		defer command(name, "-F", "FORWARD")
		defer command(name, "-P", "FORWARD", "ACCEPT")
	}
	before := command("iptables-nft", "-S", "FORWARD")
	if drops, err := Drops(Table{}); err != nil || !drops {
		t.Errorf("Drops %v %v", drops, err)
	}
	for _, want := range [][]string{{"conex0", "cxb1"}, nil} { // the second time all is there
		changed, err := Pass([]string{"conex0", "cxb1"})
		check(t, err)
		if !slices.Equal(changed, want) {
			t.Errorf("Pass changed %v, want %v", changed, want)
		}
	}
	for _, name := range []string{"iptables-nft", "ip6tables-nft"} {
		want := before
		for _, b := range []string{"conex0", "cxb1"} {
			want += "-A FORWARD -i " + b + " -j ACCEPT\n-A FORWARD -o " + b + " -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT\n"
		}
		if got := command(name, "-S", "FORWARD"); got != want {
			t.Errorf("%s has:\n%swant:\n%s", name, got, want)
		}
	}
	// Also when the policy changed meanwhile, and twice.
	command("iptables-nft", "-P", "FORWARD", "ACCEPT")
	for _, b := range []string{"conex0", "cxb1", "cxb1"} {
		check(t, Unpass(b))
	}
	for _, name := range []string{"iptables-nft", "ip6tables-nft"} {
		got := command(name, "-S", "FORWARD")
		if _, rules, _ := strings.Cut(got, "\n"); !strings.HasSuffix(before, "\n"+rules) {
			t.Errorf("%s has %s, want\n%s", name, got, before)
		}
	}
}
