package build

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"conex/internal/linux/mount"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

func keyFile(t testing.TB) (string, ssh.PublicKey) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "test")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return path, signer.PublicKey()
}

// A step's socket lists keys and signs, for keys and for an agent behind it, and does nothing else.
func TestAgentSocket(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("making a tmpfs needs root")
	}
	path, pub := keyFile(t)
	keys, err := newAgentSource(Agent{Paths: []string{path}})
	if err != nil {
		t.Fatal(err)
	}
	real := agent.NewKeyring()
	if err := addKey(real, path); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = agent.ServeAgent(real, c) }() // ends with its client
		}
	}()
	behind, err := newAgentSource(Agent{Paths: []string{sock}})
	if err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]*agentSource{"keys": keys, "socket": behind} {
		t.Run(name, func(t *testing.T) {
			folder, err := mount.New("tmpfs", nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer folder.Close()
			stop, err := src.serve(folder, "s", mountOp{UID: 3, GID: 4, Mode: 0o640})
			if err != nil {
				t.Fatal(err)
			}
			at := fmt.Sprintf("/proc/self/fd/%d/s", folder.Fd())
			if st, err := os.Lstat(at); err != nil || st.Mode() != os.ModeSocket|0o640 {
				t.Errorf("the socket: %v %v", st.Mode(), err)
			}
			c, err := net.Dial("unix", at)
			if err != nil {
				t.Fatal(err)
			}
			cl := agent.NewClient(c)
			list, err := cl.List()
			if err != nil || len(list) != 1 || !bytes.Equal(list[0].Blob, pub.Marshal()) {
				t.Fatalf("keys: %v %v", list, err)
			}
			sig, err := cl.Sign(pub, []byte("data"))
			if err != nil || pub.Verify([]byte("data"), sig) != nil {
				t.Errorf("signature: %v", err)
			}
			_, other := keyFile(t)
			if _, err := cl.Sign(other, []byte("data")); err == nil {
				t.Error("signed with a key that is not there")
			}
			for what, err := range map[string]error{
				"remove": cl.Remove(pub), "remove all": cl.RemoveAll(), "lock": cl.Lock([]byte("x")), "add": addKey(cl, path),
			} {
				if err == nil {
					t.Errorf("a step may %s", what)
				}
			}
			if list, err := cl.List(); err != nil || len(list) != 1 {
				t.Errorf("keys in the end: %v %v", list, err)
			}
			stop() // hangs up on who is still there
			if _, err := cl.List(); err == nil {
				t.Error("the agent answers after its step")
			}
			c.Close()
		})
	}
}

func TestAgentSources(t *testing.T) {
	path, _ := keyFile(t)
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("hidden"), 0o600); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, paths := range [][]string{nil, {dir}, {text}, {filepath.Join(dir, "none")}, {dead}, {path, dead}} {
		_, err := newAgentSource(Agent{Paths: paths})
		if err == nil || bytes.Contains([]byte(err.Error()), []byte("hidden")) {
			t.Errorf("%v: %v", paths, err)
		}
	}
}

// Whatever a step sends, the agent ends or answers.
func FuzzAgentMessages(f *testing.F) {
	path, pub := keyFile(f)
	src, err := newAgentSource(Agent{Paths: []string{path}})
	if err != nil {
		f.Fatal(err)
	}
	var good bytes.Buffer
	for _, msg := range [][]byte{{agentIdentities}, {17, 1, 2}, append([]byte{agentSign}, ssh.Marshal(struct {
		Blob, Data []byte
		Flags      uint32
	}{pub.Marshal(), []byte("x"), 2})...)} {
		if err := writeMessage(&good, msg); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(good.Bytes())
	f.Add([]byte{0, 0, 0, 1, agentSign})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(io.Discard, b)
		}()
		go func() { // ends when the agent has read all, or hangs up
			_, _ = b.Write(in)
			b.Close()
		}()
		src.answer(t.Context(), a)
		<-done
	})
}
