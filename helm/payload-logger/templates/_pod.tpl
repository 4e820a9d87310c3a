{{/* The pod of both modes and both controllers. */}}

{{- define "payload-logger.podTemplate" -}}
{{- $config := include "payload-logger.config" . | fromYaml -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
metadata:
  labels:
    {{- /* Not the chart's version: pods are rolled when something about them changes. */}}
    {{- include "payload-logger.selectorLabels" . | nindent 4 }}
    {{- if .Values.workloadIdentity.enabled }}
    azure.workload.identity/use: "true"
    {{- end }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: {{ ternary "model" "payload-logger" $sidecar }}
    {{- if .Values.rollOnConfigChange }}
    checksum/config: {{ include "payload-logger.config" . | sha256sum }}
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "payload-logger.serviceAccountName" . }}
  automountServiceAccountToken: {{ .Values.serviceAccount.automount }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "payload-logger.terminationGracePeriodSeconds" . }}
  securityContext:
    {{- toYaml (merge (deepCopy .Values.podSecurityContext) (dict "fsGroup" 10001 "fsGroupChangePolicy" "OnRootMismatch")) | nindent 4 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if $sidecar }}
  initContainers:
    {{- /* A native sidecar: it starts before the model, and gets SIGTERM when the model has ended. */}}
    - restartPolicy: Always
      {{- include "payload-logger.container" (dict "root" . "config" $config) | nindent 6 }}
  containers:
    {{- include "payload-logger.model" (dict "root" . "config" $config) | nindent 4 }}
  {{- else }}
  containers:
    -
      {{- include "payload-logger.container" (dict "root" . "config" $config) | nindent 6 }}
      {{- if .Values.preStopSeconds }}
      lifecycle:
        preStop:
          {{- include "payload-logger.preStop" . | nindent 10 }}
      {{- end }}
  {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "payload-logger.fullname" . }}
    {{- if not .Values.spool.persistence.enabled }}
    - name: spool
      emptyDir:
        sizeLimit: {{ .Values.spool.size }}
    {{- end }}
    {{- if include "payload-logger.customLogging" . }}
    - name: sdk-config
      emptyDir:
        sizeLimit: 1Mi
    {{- end }}
    {{- if and .Values.credentials.secretName .Values.credentials.asFile }}
    - name: credentials
      secret:
        secretName: {{ .Values.credentials.secretName }}
        defaultMode: 0440
        items:
          - key: {{ .Values.credentials.secretKey }}
            path: credential
    {{- end }}
    {{- with .Values.tls.secretName }}
    - name: tls
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- with .Values.upstreamCa }}
    {{- if .configMapName }}
    - name: upstream-ca
      configMap:
        name: {{ .configMapName }}
    {{- else if .secretName }}
    - name: upstream-ca
      secret:
        secretName: {{ .secretName }}
        defaultMode: 0440
        items:
          - key: {{ .key }}
            path: {{ .key }}
    {{- end }}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" (include "payload-logger.selectorLabels" $ | fromYaml)))) | nindent 6 }}
    {{- end }}
  {{- end }}
{{- end -}}

{{/* The proxy. Its fields are a list item's, without the dash. */}}
{{- define "payload-logger.container" -}}
{{- $values := .root.Values -}}
{{- $probes := $values.probes -}}
name: payload-logger
image: {{ include "payload-logger.image" .root }}
imagePullPolicy: {{ $values.image.pullPolicy }}
args: [run, -c, /etc/payload-logger/config.yaml]
{{- with include "payload-logger.environment" .root }}
env:
  {{- . | nindent 2 }}
{{- end }}
ports:
  - name: http
    containerPort: {{ include "payload-logger.port" (dict "key" "proxy.listen" "value" .config.proxy.listen) }}
  - name: admin
    containerPort: {{ include "payload-logger.port" (dict "key" "admin.listen" "value" .config.admin.listen) }}
{{- /* Started means: all listeners are there. With a sidecar the model starts after that, so that a scoring script finds the SDK's endpoint. */}}
startupProbe:
  {{- toYaml (merge (deepCopy $probes.startup) (dict "httpGet" (dict "path" "/readyz" "port" "admin") "periodSeconds" 1 "failureThreshold" 120)) | nindent 2 }}
readinessProbe:
  {{- toYaml (merge (deepCopy $probes.readiness) (dict "httpGet" (dict "path" "/readyz" "port" "admin") "periodSeconds" 2 "timeoutSeconds" 2 "failureThreshold" 2)) | nindent 2 }}
livenessProbe:
  {{- toYaml (merge (deepCopy $probes.liveness) (dict "httpGet" (dict "path" "/healthz" "port" "admin") "periodSeconds" 10 "timeoutSeconds" 5 "failureThreshold" 6)) | nindent 2 }}
{{- /* An emptyDir is space of the node: reserved, so that the node does not run full and evict. */}}
resources:
  {{- $resources := deepCopy $values.resources }}
  {{- if not $values.spool.persistence.enabled }}
  {{- $resources = mustMerge $resources (dict "requests" (dict "ephemeral-storage" $values.spool.size)) }}
  {{- end }}
  {{- toYaml $resources | nindent 2 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
volumeMounts:
  - name: config
    mountPath: /etc/payload-logger
    readOnly: true
  - name: spool
    mountPath: /var/lib/payload-logger
  {{- if include "payload-logger.customLogging" .root }}
  - name: sdk-config
    mountPath: {{ dir .config.custom_logging.sdk_config_path }}
  {{- end }}
  {{- if and $values.credentials.secretName $values.credentials.asFile }}
  - name: credentials
    mountPath: /etc/payload-logger-credentials
    readOnly: true
  {{- end }}
  {{- if $values.tls.secretName }}
  - name: tls
    mountPath: /etc/payload-logger-tls
    readOnly: true
  {{- end }}
  {{- if or $values.upstreamCa.configMapName $values.upstreamCa.secretName }}
  - name: upstream-ca
    mountPath: /etc/payload-logger-upstream-ca
    readOnly: true
  {{- end }}
  {{- with $values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "payload-logger.environment" -}}
{{- with .Values.credentials }}
{{- if .secretName }}
{{- $variable := get (dict "connectionString" "AZURE_STORAGE_CONNECTION_STRING" "key" "AZURE_STORAGE_KEY" "sasToken" "AZURE_STORAGE_SAS_TOKEN") .kind }}
{{- if .asFile }}
- name: {{ $variable }}_FILE
  value: /etc/payload-logger-credentials/credential
{{- else }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ .secretName }}
      key: {{ .secretKey }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "payload-logger.model" -}}
{{- $model := .root.Values.model -}}
{{- $custom := include "payload-logger.customLogging" .root -}}
- name: model
  image: {{ $model.image }}
  imagePullPolicy: {{ $model.pullPolicy }}
  {{- with $model.command }}
  command:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $model.args }}
  args:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - name: model
      containerPort: {{ $model.port }}
  {{- if or $custom $model.env }}
  env:
    {{- if $custom }}
    {{- /* What `payload-logger sdk-env` prints. */}}
    {{- $listen := .config.custom_logging.listen | toString }}
    - name: AZUREML_MDC_HOST
      value: {{ regexReplaceAll "^(0\\.0\\.0\\.0)?$" (regexReplaceAll ":?[0-9]+$" $listen "") "127.0.0.1" | quote }}
    - name: AZUREML_MDC_PORT
      value: {{ regexFind "[0-9]+$" $listen | quote }}
    - name: AZUREML_MDC_CONFIG_PATH
      value: {{ .config.custom_logging.sdk_config_path }}
    {{- end }}
    {{- with $model.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  {{- with $model.envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- range $name := list "startupProbe" "readinessProbe" "livenessProbe" "resources" "securityContext" }}
  {{- with get $model $name }}
  {{ $name }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- $lifecycle := deepCopy $model.lifecycle }}
  {{- if and (not $lifecycle.preStop) .root.Values.preStopSeconds }}
  {{- $_ := set $lifecycle "preStop" (include "payload-logger.preStop" .root | fromYaml) }}
  {{- end }}
  {{- with $lifecycle }}
  lifecycle:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or $custom $model.volumeMounts }}
  volumeMounts:
    {{- if $custom }}
    - name: sdk-config
      mountPath: {{ dir .config.custom_logging.sdk_config_path }}
      readOnly: true
    {{- end }}
    {{- with $model.volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
{{- end -}}
