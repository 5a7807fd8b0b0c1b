package credentials

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"conex/internal/linux/slack"
)

// tokenUser is the name under which a helper keeps an identity token instead of a password.
const tokenUser = "<token>"

// notFound is what helpers say when they have nothing; the protocol has no other sign.
const notFound = "credentials not found"

// maxAnswer bounds what a helper may say, in bytes.
const maxAnswer = 1 << 20

// helperPair is the JSON of the helpers' protocol.
type helperPair struct{ ServerURL, Username, Secret string }

func helperGet(ctx context.Context, name, server string) (Credentials, error) {
	out, err := helper(ctx, name, "get", server)
	if err != nil {
		if strings.Contains(out, notFound) {
			return Credentials{}, nil
		}
		return Credentials{}, err
	}
	var p helperPair
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		return Credentials{}, fmt.Errorf("docker-credential-%s get: its answer is %w", name, plain(err))
	}
	if p.Username == tokenUser {
		return Credentials{IdentityToken: p.Secret}, nil
	}
	return Credentials{Username: p.Username, Password: p.Secret}, nil
}

func helperStore(ctx context.Context, name, server string, c Credentials) error {
	p := helperPair{server, c.Username, c.Password}
	if c.IdentityToken != "" {
		p.Username, p.Secret = tokenUser, c.IdentityToken
	}
	in, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = helper(ctx, name, "store", string(in))
	return err
}

func helperErase(ctx context.Context, name, server string) error {
	if out, err := helper(ctx, name, "erase", server); err != nil && !strings.Contains(out, notFound) {
		return err
	}
	return nil
}

// helper runs docker-credential-NAME with a word of its protocol. Its standard error is the user's business only if it fails.
func helper(ctx context.Context, name, action, in string) (string, error) {
	program := "docker-credential-" + name
	if name != strings.Trim(name, "/. ") || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("%q is no name of a credential helper", name)
	}
	cmd := exec.CommandContext(ctx, program, action)
	cmd.WaitDelay = time.Second // for what it may have left running with our pipes
	cmd.Stdin = strings.NewReader(in)
	out, stderr := &bounded{}, &bounded{}
	cmd.Stdout, cmd.Stderr = out, stderr
	err := slack.Run(cmd.Run)
	switch {
	case err == nil:
		return out.String(), nil
	case ctx.Err() != nil:
		return "", ctx.Err()
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("%s is not in PATH: install it, or take it out of config.json", program)
	}
	said := out.String() // by the protocol; never of a success, which holds the secret
	if strings.TrimSpace(said) == "" {
		said = stderr.String()
	}
	line, _, _ := strings.Cut(strings.TrimSpace(said), "\n")
	if len(line) > 300 {
		line = line[:300]
	}
	line = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1 // a terminal would obey it
		}
		return r
	}, strings.ToValidUTF8(line, ""))
	return out.String(), fmt.Errorf("%s %s: %w: %s", program, action, err, line)
}

// bounded keeps the first part of what is written, and takes the rest without keeping it.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if room := maxAnswer - b.Len(); room < len(p) {
		b.Buffer.Write(p[:max(room, 0)])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}
