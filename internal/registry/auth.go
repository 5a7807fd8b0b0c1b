package registry

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"conex/internal/credentials"
)

// token is an Authorization header's value and what it is good for.
type token struct {
	value   string
	scopes  []string
	all     bool // good for everything: a name and password
	expires time.Time
}

// covers reports whether the token's scopes include a wanted one.
func (t token) covers(want string) bool {
	if t.all {
		return true
	}
	i := strings.LastIndexByte(want, ':') + 1
	for _, s := range t.scopes {
		if s == want {
			return true
		}
		if !strings.HasPrefix(s, want[:i]) {
			continue
		}
		has := strings.Split(s[i:], ",")
		if !slices.ContainsFunc(strings.Split(want[i:], ","), func(a string) bool { return !slices.Contains(has, a) }) {
			return true
		}
	}
	return false
}

// token returns the Authorization header for what scopes allow at ep, "" if none is known.
func (c *Client) token(ep Endpoint, scopes []string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for _, t := range c.tokens[ep.String()] {
		if now.Before(t.expires) && !slices.ContainsFunc(scopes, func(s string) bool { return !t.covers(s) }) {
			return t.value
		}
	}
	return ""
}

// keep remembers a token in place of those that it makes needless.
func (c *Client) keep(ep Endpoint, t token) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	list := slices.DeleteFunc(c.tokens[ep.String()], func(old token) bool {
		return !now.Before(old.expires) || old.all == t.all && !slices.ContainsFunc(old.scopes, func(s string) bool { return !t.covers(s) })
	})
	c.tokens[ep.String()] = append(list, t)
}

// forget drops an Authorization that the registry has refused.
func (c *Client) forget(ep Endpoint, value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tokens[ep.String()] = slices.DeleteFunc(c.tokens[ep.String()], func(t token) bool { return t.value == value })
}

// login answers a 401: it shows the credentials that the user has for the endpoint's host, if any, to the registry itself or to the
// token service that the challenge names. used is the Authorization that was refused; when another goroutine has logged in
// meanwhile, its token is taken.
func (c *Client) login(ctx context.Context, ep Endpoint, scopes []string, used string, challenges []string) error {
	select {
	case c.logins <- struct{}{}:
		defer func() { <-c.logins }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if t := c.token(ep, scopes); t != "" && t != used {
		return nil
	}
	creds, err := c.credentialsFor(ctx, ep)
	if err != nil {
		return err
	}
	t, _, err := c.answer(ctx, ep, scopes, creds, challenges, false)
	if err != nil {
		return err
	}
	if used != "" {
		c.forget(ep, used)
	}
	if t.value == used {
		return &AnswerError{Status: http.StatusUnauthorized, Code: "UNAUTHORIZED", Message: "incorrect username or password"}
	}
	c.keep(ep, t)
	return nil
}

// credentialsFor returns what the user has for an endpoint's host.
func (c *Client) credentialsFor(ctx context.Context, ep Endpoint) (credentials.Credentials, error) {
	if c.credentials == nil {
		return credentials.Credentials{}, nil
	}
	c.mu.Lock()
	known, ok := c.known[ep.Host]
	c.mu.Unlock()
	if ok {
		return known, nil
	}
	creds, err := c.credentials.Get(ctx, ep.Host)
	if err != nil {
		return creds, refused("%v", err)
	}
	c.mu.Lock()
	c.known[ep.Host] = creds
	c.mu.Unlock()
	return creds, nil
}

// private reports whether credentials may be sent there: by TLS, inside this machine, or where the configuration has allowed plain
// http by the host's name.
func (c *Client) private(scheme, host string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return scheme == "https" || isLoopback(host) || c.cfg[host].PlainHTTP || c.plain[host]
}

// answer makes the Authorization that a challenge wants. offline asks for a token that can be kept instead of the password, which
// is returned if the service has such.
func (c *Client) answer(ctx context.Context, ep Endpoint, scopes []string, creds credentials.Credentials, challenges []string, offline bool) (t token, identity string, err error) {
	required := &AnswerError{Status: http.StatusUnauthorized, Code: "UNAUTHORIZED", Message: "authentication required"}
	basic := false
	for _, ch := range challenges {
		scheme, params := parseChallenge(ch)
		switch strings.ToLower(scheme) {
		case "basic":
			basic = true
		case "bearer":
			if creds.RegistryToken != "" && c.private(ep.Scheme, ep.Host) && fitsHeader(creds.RegistryToken) {
				return token{value: "Bearer " + creds.RegistryToken, all: true, expires: time.Now().Add(time.Hour)}, "", nil
			}
			realm, err := url.Parse(params["realm"])
			if err != nil || realm.Host == "" || realm.Scheme != "https" && (realm.Scheme != "http" || ep.Scheme != "http") {
				return token{}, "", refused("the registry names %q as its token service: %v", oneLine(params["realm"]), ErrUnsupported)
			}
			if !creds.IsZero() && !c.private(realm.Scheme, realm.Host) && (realm.Hostname() != hostname(ep.Host) || !c.private(ep.Scheme, ep.Host)) {
				return token{}, "", refused("credentials are not sent over plain http to %s", oneLine(realm.Host))
			}
			if err := mayLead(&url.URL{Scheme: ep.Scheme, Host: ep.Host}, realm); err != nil {
				return token{}, "", err
			}
			realm.User, realm.Fragment = nil, ""
			// What the registry names may go beyond what follows from the repository's name, behind a proxy.
			asked := scopes
			for _, s := range strings.Fields(params["scope"]) {
				if !(token{scopes: asked}).covers(s) && len(asked) < maxScopes {
					asked = append(slices.Clip(asked), s)
				}
			}
			t, identity, err := c.fetchToken(ctx, realm, params["service"], asked, creds, offline)
			if err != nil {
				return token{}, "", fmt.Errorf("token from %s: %w", oneLine(realm.Host), err)
			}
			t.scopes = scopes
			return t, identity, nil
		}
	}
	switch {
	case !basic || creds.Username == "":
		return token{}, "", required
	case !c.private(ep.Scheme, ep.Host):
		return token{}, "", refused("the registry wants a password, which is not sent over plain http; plain-http = true under [registry.%q] in the configuration allows it", ep.Host)
	}
	pair := base64.StdEncoding.EncodeToString([]byte(creds.Username + ":" + creds.Password))
	return token{value: "Basic " + pair, all: true, expires: time.Now().Add(24 * time.Hour)}, "", nil
}

// fitsHeader refuses what would break out of a header, or be one that servers refuse.
func fitsHeader(s string) bool {
	return len(s) <= maxToken && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// maxScopes bounds what is asked for in one token.
const maxScopes = 8

// maxToken bounds a token in bytes: servers refuse headers of more.
const maxToken = 64 << 10

// fetchToken asks a token service: with an identity token by OAuth 2, else with name and password, or without.
func (c *Client) fetchToken(ctx context.Context, realm *url.URL, service string, scopes []string, creds credentials.Credentials, offline bool) (token, string, error) {
	q := realm.Query()
	if service != "" {
		q.Set("service", service)
	}
	q["scope"] = scopes
	if offline {
		q.Set("offline_token", "true")
		q.Set("client_id", "conex")
	}
	if creds.Username != "" {
		q.Set("account", creds.Username)
	}
	get := *realm
	get.RawQuery = q.Encode()
	form := url.Values{"service": {service}, "client_id": {"conex"}, "scope": {strings.Join(scopes, " ")}}
	post := func() (*http.Request, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
		if err != nil {
			return nil, err
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.GetBody = nil // a redirect must not carry the secret along
		return req, nil
	}
	if creds.IdentityToken != "" {
		form.Set("grant_type", "refresh_token")
		form.Set("refresh_token", creds.IdentityToken)
		return c.askToken(ctx, post)
	}
	t, identity, err := c.askToken(ctx, func() (*http.Request, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, get.String(), nil)
		if err == nil && creds.Username != "" {
			req.SetBasicAuth(creds.Username, creds.Password)
		}
		return req, err
	})
	var answer *AnswerError
	if creds.Username != "" && errors.As(err, &answer) && (answer.Status == http.StatusMethodNotAllowed || answer.Status == http.StatusNotFound) {
		// It knows OAuth 2 alone.
		form.Set("grant_type", "password")
		form.Set("username", creds.Username)
		form.Set("password", creds.Password)
		if offline {
			form.Set("access_type", "offline")
		}
		return c.askToken(ctx, post)
	}
	return t, identity, err
}

// askToken sends a request to a token service, again if that is overloaded or breaks off.
func (c *Client) askToken(ctx context.Context, make func() (*http.Request, error)) (token, string, error) {
	for n := 0; ; n++ {
		t, identity, err := c.askTokenOnce(ctx, make)
		var answer *AnswerError
		again, after := temporary(err) && !isAnswer(err), ""
		if errors.As(err, &answer) {
			again, after = answer.Status == http.StatusTooManyRequests || answer.Status >= 500, answer.after
		}
		if err == nil || !again || n+1 >= tokenAttempts || ctx.Err() != nil {
			return t, identity, err
		}
		if err := c.wait(ctx, n, after); err != nil {
			return token{}, "", err
		}
	}
}

// tokenAttempts is how often a token service is asked.
const tokenAttempts = 3

func (c *Client) askTokenOnce(ctx context.Context, make func() (*http.Request, error)) (token, string, error) {
	req, err := make()
	if err != nil {
		return token{}, "", err
	}
	inner, cancel := context.WithTimeout(ctx, c.tokenTime)
	defer cancel()
	req = req.WithContext(inner)
	req.Header.Set("User-Agent", "conex")
	resp, err := c.http.Do(req)
	var raw []byte
	if err == nil {
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return token{}, "", answerError(resp)
		}
		raw, err = io.ReadAll(io.LimitReader(resp.Body, maxError+1))
	}
	if err != nil {
		if inner.Err() != nil && ctx.Err() == nil {
			return token{}, "", fmt.Errorf("no answer within %s", c.tokenTime)
		}
		return token{}, "", plain(err)
	}
	if len(raw) > maxError {
		return token{}, "", fmt.Errorf("the answer is larger than %d bytes: %w", maxError, ErrMismatch)
	}
	return parseToken(raw, time.Now())
}

// parseToken reads a token service's answer. No error shows any of it.
func parseToken(raw []byte, now time.Time) (t token, identity string, err error) {
	var body struct {
		Token        string `json:"token"`
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
		ExpiresIn    int    `json:"expires_in"`
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		return token{}, "", fmt.Errorf("the answer is not as it should be: %w", ErrMismatch)
	}
	if body.Token == "" {
		body.Token = body.AccessToken
	}
	if body.Token == "" || !fitsHeader(body.Token) {
		return token{}, "", fmt.Errorf("the answer holds no token: %w", ErrMismatch)
	}
	if body.ExpiresIn < 60 || body.ExpiresIn > 24*3600 {
		body.ExpiresIn = 60 // the specification's default; also keeps a nonsense value from overflowing
	}
	// Ten seconds early, so that it does not end between our look and the registry's.
	return token{value: "Bearer " + body.Token, expires: now.Add(time.Duration(body.ExpiresIn-10) * time.Second)}, body.RefreshToken, nil
}

// Login shows credentials to a registry, and returns an identity token to keep instead of the password if the registry gives one.
// A nil error promises that the registry has accepted them, or wants none. Nothing is kept.
func (c *Client) Login(ctx context.Context, domain string, creds credentials.Credentials) (identity string, err error) {
	eps, err := c.itself(domain, canPull|canResolve|canPush)
	if err != nil {
		return "", err
	}
	_, err = c.firstOf(ctx, eps, func(ep Endpoint) error {
		r := request{ep: ep, method: http.MethodGet, target: ep.api() + "/", bare: true}
		resp, err := c.do(ctx, r)
		if err != nil {
			return err
		}
		challenges := resp.Header.Values("WWW-Authenticate")
		drop(resp)
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		if resp.StatusCode != http.StatusUnauthorized {
			return answerError(resp)
		}
		t, id, err := c.answer(ctx, ep, nil, creds, challenges, true)
		if err != nil {
			return err
		}
		r.header = http.Header{"Authorization": {t.value}}
		if resp, err = c.do(ctx, r); err != nil {
			return err
		}
		drop(resp)
		switch resp.StatusCode {
		case http.StatusOK:
			identity = id
			return nil
		case http.StatusUnauthorized:
			return &AnswerError{Status: resp.StatusCode, Code: "UNAUTHORIZED", Message: "incorrect username or password"}
		}
		return answerError(resp)
	})
	return identity, err
}

// parseChallenge splits a WWW-Authenticate value, RFC 9110 section 11.6.1: Bearer realm="https://a/token",service="b".
func parseChallenge(s string) (scheme string, params map[string]string) {
	scheme, rest, _ := strings.Cut(strings.TrimSpace(s), " ")
	params = map[string]string{}
	for {
		rest = strings.TrimLeft(rest, " ,\t")
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			return scheme, params
		}
		var val string
		if strings.HasPrefix(after, `"`) {
			val, rest = unquote(after[1:])
		} else {
			val, rest, _ = strings.Cut(after, ",")
			val = strings.TrimSpace(val)
		}
		params[strings.ToLower(strings.TrimSpace(key))] = val
	}
}

// unquote reads up to the closing quote of a quoted string and returns what follows it.
func unquote(s string) (val, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:]
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}
